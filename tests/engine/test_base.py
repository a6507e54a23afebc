"""Which engine `open_engine` chooses, and what it refuses."""

from __future__ import annotations

import random
from dataclasses import replace
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


def test_auto_is_sglang_on_cuda(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))
    base.register("sglang", hf_on_cpu)
    assert isinstance(start(target, EngineConfig(), device="cuda"), HfEngine)


def hf_on_cpu(settings: EngineSettings) -> Engine:
    assert settings.device.type == "cuda"
    return HfEngine(replace(settings, device=torch.device("cpu")))


def test_an_engine_of_ones_own_is_imported_first(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))
    monkeypatch.syspath_prepend(tmp_path)
    name = f"engine{random.getrandbits(40)}"
    (tmp_path / f"{name}.py").write_text(
        "from colospec.engine import base, hf\n"
        "class Mine(hf.HfEngine): pass\n"
        "base.register('mine', Mine)\n"
    )
    engine = start(target, EngineConfig(name="mine", module=name))
    assert type(engine).__name__ == "Mine"

    with pytest.raises(ValueError, match=rf"{name} registers no engine other.*hf, mine, sglang"):
        start(target, EngineConfig(name="other", module=name))


@pytest.mark.parametrize("content", [None, "import absent_package", "1 / 0"])
def test_a_module_that_does_not_import_is_named(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"engine{random.getrandbits(40)}"
    if content is not None:
        (tmp_path / f"{name}.py").write_text(content)
    with pytest.raises(ValueError, match=rf"engine\.module={name} cannot be imported \("):
        start(target, EngineConfig(name="mine", module=name))


def test_an_unknown_engine_lists_those_there_are(target: Target) -> None:
    with pytest.raises(ValueError, match=r"engine\.name=vllm is not known .*hf, sglang"):
        start(target, EngineConfig(name="vllm"))


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
