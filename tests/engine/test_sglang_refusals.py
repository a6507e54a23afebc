"""What the SGLang engine refuses before it starts: targets, arguments, and calls of stand-ins."""

from __future__ import annotations

import importlib
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colospec.config import EngineCheck, Weights
from colospec.engine import sglang_imports
from colospec.engine.sglang_args import check_keys, forward_rows
from tests.engine.sglang_cases import MAX_TOKENS, NEEDS, settings

pytestmark = NEEDS


def test_transformers_check_refuses_random_weights(qwen3: Path) -> None:
    from colospec.engine.sglang import SglangEngine

    asked = settings(qwen3, weights=Weights.random, check=EngineCheck.transformers)
    with pytest.raises(ValueError, match=r"different weights; set engine\.check=layers"):
        SglangEngine(asked)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, r"state \(linear_attention\)"),
        ({"rope_parameters": {"mrope_section": [1, 2, 3]}}, "M-RoPE"),
        ({"mamba_d_state": 16}, "Mamba"),
    ],
)
def test_targets_that_cannot_be_prefilled_are_refused_before_loading(
    qwen3: Path, config: dict[str, Any], reason: str
) -> None:
    from colospec.engine.sglang import SglangEngine

    asked = settings(qwen3)
    target = replace(asked.target, hf_config=asked.target.hf_config | config)
    with pytest.raises(ValueError, match=rf"{reason}.*set engine=hf"):
        SglangEngine(replace(asked, target=target))


def test_a_model_that_ignores_its_sliding_window_is_refused_for_longer_documents(
    qwen3: Path,
) -> None:
    from colospec.engine.sglang_runner import check_windows

    asked = settings(qwen3)
    changes = {"sliding_window": 16, "use_sliding_window": True, "layer_types": None}
    target = replace(asked.target, hf_config=asked.target.hf_config | changes)
    asked = replace(asked, target=target, max_length=MAX_TOKENS)
    plain, windowed = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    windowed.sliding_window_size = 15  # type: ignore[assignment]
    check_windows(windowed, asked)
    check_windows(plain, replace(asked, max_length=16))
    with pytest.raises(ValueError, match=r"ignores sliding_window=16.*data\.max_length=16"):
        check_windows(plain, asked)


def test_forward_rows_hold_the_longest_document(qwen3: Path) -> None:
    whole = settings(qwen3)
    parts = settings(qwen3, forward_tokens=64)
    assert forward_rows(whole) == MAX_TOKENS
    assert forward_rows(parts) == MAX_TOKENS
    assert forward_rows(replace(parts, max_length=50)) == 64
    assert forward_rows(replace(parts, max_length=100)) == 100


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("tp_size", "set engine.tp"),
        ("speculative_algorithm", "runs the target alone"),
        ("device", "topology.gpus"),
        ("model_path", "set target.path"),
        ("enable_symm_mem", "multicast"),
        ("enable_dp_attention", "every engine replica"),
    ],
)
def test_refused_arguments_give_the_reason(key: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_keys({key: 1}, {key, "quantization"})
    check_keys({"quantization": "fp8"}, {"quantization"})


def test_stand_ins_can_be_imported_but_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"absent{random.getrandbits(40)}"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, sglang_imports.StandIns([name])])
    deep = importlib.import_module(f"{name}.part.deeper")
    assert isinstance(deep.SomeClass, type)
    with pytest.raises(RuntimeError, match=rf"{name}\.part\.deeper\.work was called"):
        deep.work(1)
    assert not hasattr(deep, "__file_that_is_not_there__")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{name}x")
