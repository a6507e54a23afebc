"""Decoding through SGLang, as far as a machine without a GPU shows: counts, errors, the child."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from colospec.engine.sglang_serving import MIN_TIMED_S, ServingJob
from colospec.evaluate import served
from colospec.evaluate.acceptance import (
    DecodingSettings,
    decode_plain,
    decode_speculatively,
)
from colospec.evaluate.served import count_steps, serve
from tests.engine import targets
from tests.evaluate.models import TargetAsDrafter, Untrained, make_untrained, random_prompts

EOS = 7
K = 5


def make_request(steps: list[list[int]], limit: int) -> dict[str, Any]:
    """What SGLang reports: each step's tokens, cut at the limit of tokens or behind EOS."""
    chunks, length, finish = [[1]], 1, None
    for step in steps:
        cut = step[: limit - length]
        if EOS in cut and len(step) <= limit - length:
            cut, finish = cut[: cut.index(EOS) + 1], "stop"
        chunks.append(cut)
        length += len(cut)
        if finish or length == limit:
            break
    taken = steps[: len(chunks) - 1]
    return {
        "chunks": chunks,
        "num_steps": len(taken),
        "num_accepted": sum(len(step) - 1 for step in taken),
        "finish": finish or "length",
    }


def random_steps(draw: random.Random, number: int) -> list[list[int]]:
    return [[draw.randint(10, 99) for _ in range(draw.randint(1, K + 1))] for _ in range(number)]


def count(request: dict[str, Any]) -> tuple[list[int], list[int]]:
    return count_steps(request, eos_token_ids=frozenset([EOS]), num_proposed=K)


def test_a_step_that_the_limit_cuts_counts_in_full(random_seed: int) -> None:
    draw = random.Random(random_seed)
    steps = random_steps(draw, 20)
    length = 1 + sum(map(len, steps))
    request = make_request(steps, length - draw.randint(0, len(steps[-1]) - 1))

    output, accepted = count(request)

    assert accepted == [len(step) - 1 for step in steps]
    assert output == [token for chunk in request["chunks"] for token in chunk]


def test_a_step_that_ends_the_text_counts_what_lies_before_the_end(random_seed: int) -> None:
    draw = random.Random(random_seed)
    steps = random_steps(draw, 20)
    place = draw.randrange(len(steps[12]))
    steps[12][place] = EOS

    output, accepted = count(make_request(steps, 1000))

    assert accepted == [len(step) - 1 for step in steps[:12]] + [place]
    assert output[-1] == EOS


def test_an_end_that_the_limit_hides_from_sglang_is_found() -> None:
    """SGLang looks at the limit first and then returns what lies behind the end of the text."""
    request = make_request([[10, 11], [12, EOS, 14, 15]], 6)
    assert request["finish"] == "length"

    assert count(request) == ([1, 10, 11, 12, EOS], [1, 1])


def test_counts_that_contradict_each_other_are_an_error() -> None:
    request = make_request([[10, 11], [12]], 4) | {"num_steps": 1}
    with pytest.raises(RuntimeError, match="reports 1 verify steps"):
        count(request)


@pytest.mark.parametrize("limit", [9, 24])
def test_our_loop_and_sglang_count_alike(untrained: Untrained, limit: int) -> None:
    """The loop's own steps, reported as SGLang does, give the loop's own numbers."""
    prompts = random_prompts(6, vocab_size=untrained.target.vocab_size, seed=limit)
    settings = DecodingSettings(max_new_tokens=limit, chain_length=K)
    untrained.decoder.eos_token_ids = frozenset([EOS])
    plain = decode_plain(untrained.decoder, prompts, settings)
    drafter = TargetAsDrafter(untrained.target)
    real = decode_speculatively(untrained.decoder, drafter, prompts, settings)

    counts = [0] * K
    for prompt, output in zip(prompts, plain.outputs, strict=True):
        # A draft that is always right: whole steps, behind the end of the text as well.
        longer = decode_plain(
            untrained.decoder, [prompt], DecodingSettings(max_new_tokens=limit + K)
        ).outputs[0]
        tokens = longer[1:] + [50] * (limit + K - len(longer))
        steps = [tokens[i : i + K + 1] for i in range(0, limit - 1, K + 1)]
        _, accepted = count(make_request(steps, limit)) if output[0] != EOS else ([], [])
        for number in accepted:
            for place in range(number):
                counts[place] += 1
    assert counts == real.num_reached


# --- the child process

needs_sglang_on_cpu = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("sglang") is None,
    reason="wants SGLang on a machine without a GPU; tests/gpu/test_serve.py is for one with it",
)


def make_job(path: Path, **changes: Any) -> ServingJob:
    words: dict[str, Any] = {
        "target": str(path),
        "dtype": "float32",
        "device": "cpu",
        "trust_remote_code": False,
        "prompts": [[1, 2, 3], [4, 5, 6, 8, 9]],
        "batch_sizes": [1, 3],
        "temperatures": [0.0],
        "max_new_tokens": 9,
        "eos_token_ids": [],
        "speculative": {},
    }
    return ServingJob(**(words | changes))


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@needs_sglang_on_cpu
def test_sglang_decodes_what_our_loop_decodes(tmp_path: Path, random_seed: int) -> None:
    models = make_untrained(tmp_path / "target", seed=random_seed, head_dim=16)
    prompts = random_prompts(3, vocab_size=models.target.vocab_size, seed=random_seed)
    plain = decode_plain(models.decoder, prompts, DecodingSettings(max_new_tokens=9))
    eos = plain.outputs[0][4]
    models.decoder.eos_token_ids = frozenset([eos])
    plain = decode_plain(models.decoder, prompts, DecodingSettings(max_new_tokens=9))
    before = children()

    result = serve(
        make_job(models.target.path, prompts=[p.tolist() for p in prompts], eos_token_ids=[eos])
    )

    for run in result.runs:
        assert run.acceptance.outputs == plain.outputs
        assert run.acceptance.acceptance_length == 1.0
        assert run.acceptance.seconds >= MIN_TIMED_S
        rounds, left = divmod(run.acceptance.num_tokens, plain.num_tokens)
        assert rounds > 0
        assert left == 0
    assert children() <= before


@needs_sglang_on_cpu
def test_a_failing_child_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no draft ended with code 1 \(loading the models\)"):
        serve(make_job(tmp_path))


FAILING = """
import threading, time
from colospec.engine import sglang_serving

def run(job, out):
    threading.Thread(target=time.sleep, args=(90,)).start()
    raise RuntimeError("no such thing")

sglang_serving.run = run
sglang_serving.main()
"""


def test_a_child_that_fails_ends_although_its_threads_go_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING],
        input=json.dumps(asdict(make_job(tmp_path))),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: no such thing" in done.stderr


def test_a_child_that_is_silent_is_ended_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "START_S", 0.2)
    before, began = children(), time.monotonic()
    with pytest.raises(RuntimeError, match=r"within 0 s \(loading the models\)"):
        serve(make_job(targets.save(tmp_path, "Qwen3")))
    assert time.monotonic() - began < 20
    assert children() <= before
