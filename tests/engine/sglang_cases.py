"""What the tests of the SGLang engine on a CPU share; SGLang itself runs in fresh processes."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from colospec.batch import FeatureSpec, TokenBatch
from colospec.config import EngineConfig, Weights
from colospec.engine.base import EngineSettings, open_engine
from colospec.engine.hf import HfEngine
from colospec.target import Target
from tests.engine import targets
from tests.engine.conformance import capture, random_batch, tensors

NEEDS = [
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="wants a machine without a GPU; tests/gpu/test_sglang.py is for one with it",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None,
        reason="wants SGLang: pip install --no-deps -r constraints/sglang-cpu.txt",
    ),
]

CPU = torch.device("cpu")
AUX = (3, 0, 4)
MAX_TOKENS, MAX_SEQUENCES = 256, 8


def settings(path: Path, *, weights: Weights = Weights.pretrained, **config: Any) -> EngineSettings:
    target = Target.load(path)
    return EngineSettings(
        config=EngineConfig(name="sglang", **config),
        target=target,
        spec=FeatureSpec(AUX, True, target.hidden_size, target.dtype),
        weights=weights,
        trust_remote_code=False,
        device=CPU,
        max_tokens=MAX_TOKENS,
        max_sequences=MAX_SEQUENCES,
    )


def batches(seed: int) -> list[TokenBatch]:
    """Random packed documents, up to the limits; the first has the longest possible document."""
    draw = random.Random(seed)
    made = [random_batch([MAX_TOKENS], vocab_size=targets.VOCAB_SIZE, seed=seed)]
    for index in range(4):
        lengths = [draw.randint(1, 31) for _ in range(draw.randint(1, MAX_SEQUENCES))]
        made.append(random_batch(lengths, vocab_size=targets.VOCAB_SIZE, seed=seed + index))
    return made


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def captured_by(engine: Any, seed: int) -> list[Any]:
    """Return what the engine captures, in a form that can leave the process."""
    captured = [capture(engine, batch, CPU) for batch in batches(seed)]
    return [[view.numpy() for view in tensors(features)] for features in captured]


def assert_same(ours: list[Any], path: Path, seed: int) -> None:
    """Compare with the transformers engine, in this process that SGLang has not touched."""
    oracle = HfEngine(settings(path))
    for views, tokens in zip(ours, batches(seed), strict=True):
        expected = capture(oracle, tokens, CPU)
        for actual, other in zip(views, tensors(expected), strict=True):
            near(torch.from_numpy(actual), other)


def error_of(call: Any, *args: Any) -> str:
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def open_engine_for(asked: EngineSettings) -> Any:
    return open_engine(
        asked.config,
        asked.target,
        asked.spec,
        weights=asked.weights,
        trust_remote_code=False,
        device=asked.device,
        max_tokens=asked.max_tokens,
        max_sequences=asked.max_sequences,
    )
