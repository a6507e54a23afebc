"""The SGLang engine on GPUs against the transformers engine, in bfloat16.

Each test starts fresh processes (SGLang's state is global); what a process sees comes back as
numbers.
"""

from __future__ import annotations

import importlib.util
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colospec.batch import Features, FeatureSpec, TokenBatch
from colospec.config import EngineCheck, EngineConfig, Weights
from colospec.engine.base import EngineSettings
from colospec.target import Target
from tests.engine import targets
from tests.engine.conformance import capture, check_engine, random_batch, tensors
from tests.gpu import machine
from tests.ranks import run_ranks

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None,
    reason="wants SGLang: pip install --no-deps -r constraints/sglang-0.5.17.txt",
)
BACKEND = "cpu:gloo,cuda:nccl"
# Kernels for other shapes may have to be compiled first.
TIMEOUT_S = 400.0
MAX_TOKENS, MAX_SEQUENCES, MAX_LENGTH = 4096, 32, 2048
AUX = (6, 1, 7)
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
}
# bfloat16 rounds to 0.4 %; eight layers of it.
MAX_ERROR = 0.03


@pytest.fixture(scope="module")
def seed() -> int:
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    directory = tmp_path_factory.mktemp("qwen3")
    return targets.save(directory, "Qwen3", dtype=torch.bfloat16, seed=seed, **SHAPE)


def settings(
    path: Path, rank: int = 0, *, weights: Weights = Weights.pretrained, **config: Any
) -> EngineSettings:
    target = Target.load(path)
    return EngineSettings(
        config=EngineConfig(name="sglang", **config),
        target=target,
        spec=FeatureSpec(AUX, True, target.hidden_size, torch.bfloat16),
        weights=weights,
        trust_remote_code=False,
        device=torch.device("cuda", rank),
        max_tokens=MAX_TOKENS,
        max_sequences=MAX_SEQUENCES,
        max_length=MAX_LENGTH,
    )


def start(asked: EngineSettings) -> Any:
    from colospec.engine.sglang import SglangEngine

    torch.cuda.set_device(asked.device)
    return SglangEngine(asked)


def batches(seed: int, number: int) -> list[TokenBatch]:
    """Random packed documents; the first micro-batch is as large as can be."""
    draw = random.Random(seed)
    made = [_batch([MAX_LENGTH, MAX_TOKENS - MAX_LENGTH], seed)]
    while len(made) < number:
        lengths = [draw.randint(1, 128) for _ in range(draw.randint(1, MAX_SEQUENCES))]
        made.append(_batch(lengths, seed + len(made)))
    return made


def _batch(lengths: list[int], seed: int) -> TokenBatch:
    return random_batch(lengths, vocab_size=SHAPE["vocab_size"], seed=seed)


def errors(actual: Features, expected: Features) -> list[float]:
    """Relative error of each aux layer and of the last hidden states."""
    width = SHAPE["hidden_size"]
    found = []
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        for x, y in zip(one.split(width, dim=1), other.split(width, dim=1), strict=True):
            found.append(float((x.double() - y.double()).norm() / y.double().norm()))
    return found


def oracle(asked: EngineSettings, given: list[TokenBatch]) -> list[Features]:
    from colospec.engine.hf import HfEngine

    torch.cuda.set_device(asked.device)
    engine = HfEngine(replace(asked, config=EngineConfig(name="hf")))
    expected = [capture(engine, tokens, asked.device) for tokens in given]
    engine.close()
    return expected


# --- one GPU


def one_gpu(_rank: int, path: Path, backend: str, seed: int) -> dict[str, Any]:
    chosen = {} if backend == "auto" else {"server_args": {"attention_backend": backend}}
    asked = settings(path, check=EngineCheck.transformers, **chosen)
    given = batches(seed, 6)
    expected = oracle(asked, given)
    engine = start(asked)
    seen: dict[str, Any] = {"backend": engine.attention_backend}
    seen["errors"] = [
        errors(capture(engine, tokens, asked.device), other)
        for tokens, other in zip(given, expected, strict=True)
    ]
    check_engine(
        engine,
        device=asked.device,
        vocab_size=SHAPE["vocab_size"],
        longest=MAX_LENGTH,
        seed=seed,
        close=_close,
    )
    seen["host_s"] = _capture_without_waiting(engine, asked.device, seed)
    seen["bytes"] = _bytes_over_time(engine, asked.device, seed)
    engine.close()
    return seen


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Packed and alone take other kernels: equal but for rounding."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < MAX_ERROR, error


def _capture_without_waiting(engine: Any, device: torch.device, seed: int) -> float:
    """Capture where waiting for the device is an error; return seconds of host time a capture."""
    given = batches(seed + 1, 8)
    views = [Features.empty(engine.spec, tokens.num_tokens, device) for tokens in given]
    for tokens, out in zip(given, views, strict=True):
        engine.capture(tokens, out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.monotonic()
        for tokens, out in zip(given, views, strict=True):
            engine.capture(tokens, out)
        return (time.monotonic() - began) / len(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _bytes_over_time(engine: Any, device: torch.device, seed: int) -> list[tuple[int, int]]:
    """Return allocated and reserved bytes after 20, 40, ... 200 captures of random lengths."""
    out = Features.empty(engine.spec, MAX_TOKENS, device)
    history = []
    for index, tokens in enumerate(batches(seed + 2, 200)):
        rows = slice(0, tokens.num_tokens)
        assert out.last_hidden_states is not None
        part = Features(out.aux_hidden_states[rows], out.last_hidden_states[rows])
        engine.capture(tokens, part)
        if index % 20 == 19:
            torch.cuda.synchronize()
            history.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    return history


@pytest.fixture(scope="module", params=["auto", "triton"])
def alone(request: pytest.FixtureRequest, qwen3: Path, seed: int) -> dict[str, Any]:
    (seen,) = run_ranks(
        one_gpu, 1, qwen3, request.param, seed, timeout_s=TIMEOUT_S, backend=BACKEND
    )
    return {"asked": request.param, **seen}


one = [pytest.mark.gpu, machine.needs_gpus(1), needs_sglang]


def marked(marks: list[Any]) -> Any:
    def apply(test: Any) -> Any:
        for mark in marks:
            test = mark(test)
        return test

    return apply


@marked(one)
def test_states_are_those_of_transformers(alone: dict[str, Any]) -> None:
    assert max(max(found) for found in alone["errors"]) < MAX_ERROR, alone["errors"]


@marked(one)
def test_fa3_is_chosen_where_it_loads(alone: dict[str, Any]) -> None:
    hopper = torch.cuda.get_device_capability(0) == (9, 0)
    expected = "fa3" if alone["asked"] == "auto" and hopper else "triton"
    assert alone["backend"] == expected


@marked(one)
def test_the_host_never_waits_for_the_device(alone: dict[str, Any]) -> None:
    """A wait would have raised; and a capture of 8 layers is a matter of milliseconds."""
    assert alone["host_s"] < 0.05


@marked(one)
def test_memory_stays_flat_over_captures_of_random_lengths(alone: dict[str, Any]) -> None:
    allocated, reserved = zip(*alone["bytes"], strict=True)
    # The attention backend keeps the page table of the last batch.
    assert max(allocated) - min(allocated) < 4 * 2**20, allocated
    # A fresh pattern of lengths may fragment the cache a little.
    assert reserved[-1] - reserved[0] < 64 * 2**20, reserved


def from_config(_rank: int, directory: Path, seed: int) -> Any:
    asked = settings(directory, weights=Weights.random)
    engine = start(asked)
    out = capture(engine, batches(seed, 1)[0], asked.device)
    pool = engine._runner.max_total_num_tokens
    finite = all(bool(view.isfinite().all()) for view in tensors(out))
    assert out.last_hidden_states is not None
    return finite, float(out.last_hidden_states.float().std(0).min()), pool


@marked(one)
def test_random_weights_need_config_json_alone(qwen3: Path, seed: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((qwen3 / "config.json").read_text())
    ((finite, spread, pool),) = run_ranks(
        from_config, 1, tmp_path, seed, timeout_s=TIMEOUT_S, backend=BACKEND
    )
    assert finite
    assert spread > 0.1
    assert pool == MAX_TOKENS


def in_fp8(_rank: int, path: Path, seed: int) -> list[list[float]]:
    asked = settings(path, server_args={"quantization": "fp8"})
    given = batches(seed, 3)
    expected = oracle(asked, given)
    engine = start(asked)
    return [
        errors(capture(engine, tokens, asked.device), other)
        for tokens, other in zip(given, expected, strict=True)
    ]


@marked(one)
def test_a_target_quantised_by_sglang_is_near_the_whole_one(qwen3: Path, seed: int) -> None:
    (found,) = run_ranks(in_fp8, 1, qwen3, seed, timeout_s=TIMEOUT_S, backend=BACKEND)
    # Three bits of mantissa: 6 % a product; two products in a row in each of eight layers.
    assert max(map(max, found)) < 0.3, found
    assert min(map(min, found)) > 0.03, found  # it is quantised


# --- several GPUs


def together(rank: int, path: Path, tp: int, seed: int) -> list[list[float]]:
    asked = settings(path, rank, tp=tp, forward_tokens=3000)
    given = batches(seed, 2 * tp)
    expected = oracle(asked, given)
    engine = start(asked)
    found = []
    for index, (tokens, other) in enumerate(zip(given, expected, strict=True)):
        if index % tp == rank:
            found.append(errors(capture(engine, tokens, asked.device), other))
        else:
            engine.capture(tokens, None)
    torch.cuda.synchronize()
    return found


def side_by_side(rank: int, path: Path, seed: int) -> list[list[float]]:
    """Each rank of one NCCL world runs an engine of its own, as in mode=alternate."""
    asked = settings(path, rank)
    given = batches(seed + rank, 3)
    expected = oracle(asked, given)
    engine = start(asked)
    one = torch.ones(1, device=asked.device)
    dist.all_reduce(one)
    assert float(one) == dist.get_world_size()
    return [
        errors(capture(engine, tokens, asked.device), other)
        for tokens, other in zip(given, expected, strict=True)
    ]


@marked([pytest.mark.multi_gpu, needs_sglang])
@pytest.mark.parametrize(
    "tp",
    [pytest.param(2, marks=machine.needs_gpus(2)), pytest.param(4, marks=machine.needs_gpus(4))],
)
def test_ranks_share_one_target_and_each_writes_its_own(qwen3: Path, seed: int, tp: int) -> None:
    results = run_ranks(together, tp, qwen3, tp, seed, timeout_s=TIMEOUT_S, backend=BACKEND)
    for found in results:
        assert len(found) == 2
        assert max(map(max, found)) < MAX_ERROR, found


@marked([pytest.mark.multi_gpu, machine.needs_gpus(2), needs_sglang])
def test_ranks_of_one_world_run_engines_of_their_own(qwen3: Path, seed: int) -> None:
    results = run_ranks(side_by_side, 2, qwen3, seed, timeout_s=TIMEOUT_S, backend=BACKEND)
    for found in results:
        assert max(map(max, found)) < MAX_ERROR, found
