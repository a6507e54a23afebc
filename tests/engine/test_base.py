"""Which engine `open_engine` chooses, and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from colospec.batch import FeatureSpec
from colospec.config import EngineConfig, Weights
from colospec.engine import base
from colospec.engine.base import Engine, EngineSettings, open_engine
from colospec.engine.hf import HfEngine
from colospec.target import Target
from tests.engine import targets


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target.load(targets.save(tmp_path, "Llama"))


def start(
    target: Target,
    config: EngineConfig,
    *,
    device: str = "cpu",
    aux: tuple[int, ...] = (1,),
    hidden_size: int | None = None,
) -> Engine:
    return open_engine(
        config,
        target,
        FeatureSpec(aux, False, hidden_size or target.hidden_size, target.dtype),
        weights=Weights.pretrained,
        trust_remote_code=False,
        device=torch.device(device),
        max_tokens=32,
        max_sequences=4,
    )


def test_auto_is_hf_on_a_cpu(target: Target) -> None:
    assert isinstance(start(target, EngineConfig()), HfEngine)


@pytest.mark.skipif(
    importlib.util.find_spec("sglang") is not None, reason="wants a machine without sglang"
)
def test_sglang_that_is_not_installed_says_what_to_install(target: Target) -> None:
    with pytest.raises(ValueError, match=r"pip install 'colospec\[sglang\]'.*engine=hf"):
        start(target, EngineConfig(name="sglang"), device="cuda")


def test_hf_refuses_tensor_parallelism(target: Target) -> None:
    with pytest.raises(ValueError, match=r"engine\.tp=2.*engine\.tp=1"):
        start(target, EngineConfig(name="hf", tp=2))


def test_absent_aux_layers_are_named(target: Target) -> None:
    with pytest.raises(ValueError, match=r"\[5\].*layers 0 to 4"):
        start(target, EngineConfig(), aux=(1, 5))


def test_draft_of_another_target_is_refused(target: Target) -> None:
    with pytest.raises(ValueError, match=r"width 64.*hidden_size=48"):
        start(target, EngineConfig(), hidden_size=64)


def test_registered_engine_gets_all_settings(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))
    seen: list[EngineSettings] = []

    def factory(settings: EngineSettings) -> Engine:
        seen.append(settings)
        return HfEngine(settings)

    base.register("sglang", factory)
    start(target, EngineConfig(name="sglang"))

    assert seen[0].target is target
    assert (seen[0].max_tokens, seen[0].max_sequences) == (32, 4)
