"""The SGLang engine on the CPU against the transformers engine.

SGLang's state is global and importing it takes seconds, so each fixture starts one or two fresh
processes and lets them do everything that they can show; the tests look at what they brought back.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from colospec.batch import FeatureSpec, TokenBatch
from colospec.config import EngineCheck, EngineConfig, Weights
from colospec.engine import sglang_imports, sglang_install
from colospec.engine.base import EngineSettings, open_engine
from colospec.engine.hf import HfEngine
from colospec.engine.sglang_args import check_keys, forward_rows
from colospec.target import Target
from tests.engine import targets
from tests.engine.conformance import capture, check_engine, random_batch, tensors
from tests.ranks import run_ranks

pytestmark = [
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


# --- one rank: everything that one process can show


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
def seed() -> int:
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    return targets.save(tmp_path_factory.mktemp("qwen3"), "Qwen3", seed=seed)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    return targets.save(directory, "Llama", seed=seed, tie_word_embeddings=True)


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


# --- a process without a group, as in evaluation; a tied head


def without_group(_rank: int, path: Path, seed: int) -> Any:
    dist.destroy_process_group()
    engine = open_engine_for(settings(path))
    captured = captured_by(engine, seed)
    had_group = dist.is_initialized()
    engine.close()
    still_has_group = dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return captured, had_group, still_has_group


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


def test_a_process_without_a_group_gets_one_for_the_engine(llama: Path, seed: int) -> None:
    ((captured, had_group, still_has_group),) = run_ranks(
        without_group, 1, llama, seed, timeout_s=120
    )
    assert had_group
    assert not still_has_group
    assert_same(captured, llama, seed)


# --- ranks of one world that each run an engine of their own, as in mode=alternate


def side_by_side(rank: int, directory: Path, seed: int) -> Any:
    torch.manual_seed(rank)
    engine = open_engine_for(settings(directory, weights=Weights.random))
    size = dist.get_world_size()
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    other = dist.new_group([0, 1])
    dist.all_reduce(total, group=other)
    if rank == 0:
        # Not in step with the other rank.
        captured_by(engine, seed + 1)
    return captured_by(engine, seed), size, float(total)


def test_ranks_of_one_world_run_engines_of_their_own_from_config_alone(
    qwen3: Path, seed: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((qwen3 / "config.json").read_text())
    results = run_ranks(side_by_side, 2, tmp_path, seed, timeout_s=120)
    for captured, size, total in results:
        assert (size, total) == (2, 6.0)
        for one, same in zip(captured, results[0][0], strict=True):
            for actual, expected in zip(one, same, strict=True):
                assert np.isfinite(actual).all()
                assert np.array_equal(actual, expected)
    # Norms of 1 and sensible matrices: the states are neither zero nor the same for all tokens.
    assert results[0][0][0][1].std(0).min() > 0.1


# --- tensor parallel


def together(rank: int, path: Path, tp: int, seed: int) -> list[Any]:
    engine = open_engine_for(settings(path, tp=tp, forward_tokens=60))
    captured = []
    for index, batch in enumerate(batches(seed)):
        writer = index % tp
        if rank == writer:
            views = tensors(capture(engine, batch, CPU))
            captured.append([view.numpy() for view in views])
        else:
            engine.capture(batch, None)
    return captured


def check_together(path: Path, tp: int, seed: int) -> None:
    results = [
        iter(captured) for captured in run_ranks(together, tp, path, tp, seed, timeout_s=240)
    ]
    in_order = [next(results[index % tp]) for index in range(len(batches(seed)))]
    assert_same(in_order, path, seed)


def test_two_ranks_share_one_target_and_each_writes_its_own(qwen3: Path, seed: int) -> None:
    check_together(qwen3, 2, seed)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [4, 8])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_many_ranks_share_one_target(tmp_path: Path, seed: int, family: str, tp: int) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    path = targets.save(tmp_path, family, seed=seed, intermediate_size=128, head_dim=8, **shape)
    check_together(path, tp, seed)


def wrong_world(_rank: int, path: Path) -> str:
    return error_of(open_engine_for, settings(path, tp=3))


def test_a_world_of_another_size_is_refused(qwen3: Path) -> None:
    for text in run_ranks(wrong_world, 2, qwen3, timeout_s=120):
        assert "engine.tp=3, but the process group of this rank has 2 ranks" in text


# --- what needs no SGLang


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


def test_missing_sglang_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_install.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeError, match=r"make install-gpu.*engine=hf"):
        sglang_install.check_installation()


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
