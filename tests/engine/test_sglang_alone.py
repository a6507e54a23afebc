"""The SGLang engine on the CPU, alone: everything that one process can show.

SGLang's state is global and importing it takes seconds, so one fresh process does it all; the tests
look at what it brought back.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colospec.config import EngineCheck, EngineConfig
from colospec.engine.base import EngineSettings
from tests.engine import targets
from tests.engine.conformance import capture, check_engine, random_batch
from tests.engine.sglang_cases import (
    CPU,
    MAX_TOKENS,
    NEEDS,
    assert_same,
    batches,
    captured_by,
    error_of,
    near,
    settings,
)
from tests.ranks import run_ranks

pytestmark = NEEDS


def one_rank(_rank: int, path: Path, seed: int) -> dict[str, Any]:
    """Run in a fresh process."""
    from colospec.engine import sglang

    ours = logging.getLogger("colospec")
    handler = logging.NullHandler()
    ours.addHandler(handler)
    asked = settings(path, forward_tokens=40, check=EngineCheck.transformers)
    signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    engine = sglang.SglangEngine(asked)
    kept = signals == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen: dict[str, Any] = {"captured": captured_by(engine, seed)}
    check_engine(
        engine,
        device=CPU,
        vocab_size=targets.VOCAB_SIZE,
        longest=MAX_TOKENS,
        seed=seed,
        close=near,
    )
    seen["sizes"] = _forward_sizes(engine, [30, 11, 9, 0, 100, 40, 1])
    seen["too long"] = _with_shorter_limit(engine)
    big = random_batch([MAX_TOKENS, 1], vocab_size=targets.VOCAB_SIZE, seed=seed)
    seen["too big"] = error_of(capture, engine, big, CPU)
    engine.capture(batches(seed)[1], None)
    seen["second engine"] = error_of(sglang.SglangEngine, asked)
    seen["refused"] = {
        key: error_of(_server_args, asked, {key: value})
        for key, value in (("pp_size", 2), ("attention_bakend", "triton"), ("load_format", "gguf"))
    }
    seen["bad value"] = error_of(_server_args, asked, {"enable_deterministic_inference": True})
    seen["signals"] = kept
    seen["log"] = (ours.disabled, handler in ours.handlers, logging.root.handlers)
    seen["wrong layer"] = _with_hook_on_wrong_layer(engine)
    seen["leaking documents"] = _with_documents_run_together(engine)
    seen["other weights"] = _with_other_weights(engine)
    model, pool = engine._runner.model, engine._runner.token_to_kv_pool
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    engine.close()
    engine.close()
    left = [*model.parameters(), *model.buffers(), *pool.k_buffer, *pool.v_buffer]
    seen["left"] = sum(tensor.numel() for tensor in left)
    seen["closed"] = error_of(capture, engine, batches(seed)[1], CPU)
    return seen


def _server_args(asked: EngineSettings, values: dict[str, Any]) -> None:
    from colospec.engine.sglang_args import server_args

    server_args(replace(asked, config=EngineConfig(name="sglang", server_args=values)))


def _forward_sizes(engine: Any, lengths: list[int]) -> list[list[int]]:
    """Return the document lengths of each forward pass that a micro-batch takes."""
    sizes = []
    build = engine._builder.build

    def record(token_ids: torch.Tensor, positions: torch.Tensor, parts: list[int]) -> Any:
        sizes.append(list(parts))
        return build(token_ids, positions, parts)

    engine._builder.build = record
    capture(engine, random_batch(lengths, vocab_size=targets.VOCAB_SIZE, seed=0), CPU)
    engine._builder.build = build
    return sizes


def _with_shorter_limit(engine: Any) -> str:
    whole = engine.settings
    engine.settings = replace(whole, max_length=20)
    try:
        tokens = random_batch([20, 21], vocab_size=targets.VOCAB_SIZE, seed=0)
        return error_of(capture, engine, tokens, CPU)
    finally:
        engine.settings = whole


def _with_hook_on_wrong_layer(engine: Any) -> str:
    from colospec.engine.sglang_check import check_layers

    right = engine.layers[3]._forward_hooks.copy()
    engine.layers[3]._forward_hooks.clear()
    handle = engine.layers[2].register_forward_hook(engine._adder(0))
    try:
        return error_of(check_layers, engine)
    finally:
        handle.remove()
        engine.layers[3]._forward_hooks.update(right)
        check_layers(engine)


def _with_documents_run_together(engine: Any) -> str:
    from colospec.engine.sglang_check import check_layers

    build = engine._builder.build
    engine._builder.build = lambda ids, positions, lengths: build(ids, positions, [sum(lengths)])
    engine._forward_tokens = MAX_TOKENS
    try:
        return error_of(check_layers, engine)
    finally:
        engine._builder.build = build


def _with_other_weights(engine: Any) -> str:
    from colospec.engine.sglang_check import check_transformers

    check_transformers(engine)
    with torch.no_grad():
        engine.layers[1].mlp.down_proj.weight.mul_(2)
    return error_of(check_transformers, engine)


@pytest.fixture(scope="module")
def alone(qwen3: Path, seed: int) -> dict[str, Any]:
    (seen,) = run_ranks(one_rank, 1, qwen3, seed, timeout_s=120)
    return dict(seen)


def test_states_are_those_of_transformers(alone: dict[str, Any], qwen3: Path, seed: int) -> None:
    assert_same(alone["captured"], qwen3, seed)


def test_a_micro_batch_is_split_between_documents(alone: dict[str, Any]) -> None:
    assert alone["sizes"] == [[30], [11, 9], [100], [40], [1]]


def test_a_micro_batch_above_the_limits_is_refused(alone: dict[str, Any]) -> None:
    assert "257 tokens in 2 documents" in alone["too big"]
    assert "data.token_budget" in alone["too big"]
    assert "a document of 21 tokens" in alone["too long"]


def test_a_wrong_layer_is_found_at_start_and_named(alone: dict[str, Any]) -> None:
    assert alone["wrong layer"].startswith("RuntimeError: engine=sglang: layer 3 captured")


def test_documents_that_see_each_other_are_found_at_start(alone: dict[str, Any]) -> None:
    assert "packed tokens and the document alone differ by" in alone["leaking documents"]


def test_weights_that_transformers_does_not_have_are_found(alone: dict[str, Any]) -> None:
    # Layers 3, 0, 4 are captured; layer 1 is wrong.
    assert "layer 3 in SGLang and transformers differ by" in alone["other weights"]


def test_a_process_starts_one_engine(alone: dict[str, Any]) -> None:
    assert "one engine=sglang per process" in alone["second engine"]


def test_arguments_that_cannot_work_are_refused_by_name(alone: dict[str, Any]) -> None:
    assert "engine.server_args.pp_size cannot be set (every engine" in alone["refused"]["pp_size"]
    assert "set target.weights" in alone["refused"]["load_format"]
    assert "did you mean attention_backend" in alone["refused"]["attention_bakend"]
    assert alone["bad value"].startswith("ValueError: SGLang refuses")
    assert "deterministic inference" in alone["bad value"]


def test_sglang_leaves_our_log_and_signals_alone(alone: dict[str, Any]) -> None:
    assert alone["signals"]
    disabled, kept, root = alone["log"]
    assert not disabled
    assert kept
    assert root == []


def test_a_closed_engine_has_freed_its_memory_and_says_so(alone: dict[str, Any]) -> None:
    assert alone["closed"] == "RuntimeError: the engine is closed"
    assert alone["left"] == 0
