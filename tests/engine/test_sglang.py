"""The SGLang engine on the CPU in every kind of world, against the transformers engine.

SGLang's state is global and importing it takes seconds, so each test starts fresh processes and
looks at what they brought back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from colospec.config import Weights
from colospec.engine import sglang_install
from tests.engine import targets
from tests.engine.conformance import capture, tensors
from tests.engine.sglang_cases import (
    CPU,
    NEEDS,
    assert_same,
    batches,
    captured_by,
    error_of,
    open_engine_for,
    settings,
)
from tests.ranks import run_ranks

pytestmark = NEEDS


def test_missing_sglang_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_install.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeError, match=r"make install-gpu.*engine=hf"):
        sglang_install.check_installation()


# --- a process without a group, as in evaluation; a tied head


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    return targets.save(directory, "Llama", seed=seed, tie_word_embeddings=True)


def without_group(_rank: int, path: Path, seed: int) -> Any:
    dist.destroy_process_group()
    engine = open_engine_for(settings(path))
    captured = captured_by(engine, seed)
    had_group = dist.is_initialized()
    engine.close()
    still_has_group = dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return captured, had_group, still_has_group


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
