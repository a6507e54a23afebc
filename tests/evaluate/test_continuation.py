"""Rows that the target writes: prompts kept, drawn from its distribution, ended where it ends."""

from __future__ import annotations

from pathlib import Path

import torch

from colospec.evaluate.continuation import continue_prompts
from colospec.target import Target
from tests.engine import targets
from tests.evaluate.models import CPU


def write(target: Target, prompts: torch.Tensor, seed: int, **changes: object) -> list[list[int]]:
    settings = {"num_tokens": 9, "temperature": 1.0, "batch_size": 3} | changes
    return continue_prompts(target, prompts, seed=seed, device=CPU, **settings)


def save(path: Path, seed: int, eos: int | list[int] | None) -> Target:
    settings = {"eos_token_id": eos, "pad_token_id": 0}
    return Target.load(targets.save(path, "Qwen3", seed=seed, **settings))


def test_rows_begin_with_their_prompts_and_repeat_with_their_seed(
    tmp_path: Path, random_seed: int
) -> None:
    target = save(tmp_path, random_seed, None)
    prompts = torch.randint(target.vocab_size, (7, 5))
    state = torch.get_rng_state()

    rows = write(target, prompts, random_seed)

    assert [row[:5] for row in rows] == prompts.tolist()
    assert {len(row) for row in rows} == {14}
    assert rows == write(target, prompts, random_seed)
    assert rows != write(target, prompts, random_seed + 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cold_target_writes_what_plain_decoding_gives(tmp_path: Path, random_seed: int) -> None:
    from transformers import AutoModelForCausalLM

    target = save(tmp_path, random_seed, None)
    prompts = torch.randint(target.vocab_size, (2, 5))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=target.dtype).eval()
    known = prompts
    with torch.no_grad():
        for _ in range(9):
            known = torch.cat([known, model(known).logits[:, -1:].argmax(-1)], dim=1)

    assert write(target, prompts, random_seed, temperature=1e-7) == known.tolist()


def test_a_row_ends_behind_the_first_end_token_that_is_written(
    tmp_path: Path, random_seed: int
) -> None:
    ends = list(range(0, 400, 3))
    target = save(tmp_path, random_seed, ends)
    ends = [end for end in ends if end < target.vocab_size]
    prompts = torch.full((40, 2), ends[1])

    rows = write(target, prompts, random_seed, batch_size=40)

    for row in rows:
        written = row[2:]
        stops = [place for place, token in enumerate(written) if token in ends]
        assert stops in ([], [len(written) - 1])
    assert min(map(len, rows)) < 11
