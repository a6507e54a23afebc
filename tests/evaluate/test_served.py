"""Decoding through SGLang, as far as a machine without a GPU shows: counts, errors, the child."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from colospec.checkpoint.export import export_draft
from colospec.config import DraftConfig
from colospec.draft import registry
from colospec.draft.base import DraftModel
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.eagle3.config import Eagle3Config
from colospec.engine.sglang_serving import ServingJob
from colospec.evaluate import __main__ as command
from colospec.evaluate import served, through
from colospec.evaluate.acceptance import (
    Acceptance,
    DecodingSettings,
    decode_plain,
    decode_speculatively,
)
from colospec.evaluate.drafters import GreedyProposals
from colospec.evaluate.sampling import Sampler
from colospec.evaluate.served import Served, ServedRun, count_steps, serve
from colospec.evaluate.through import (
    ThroughSglang,
    arguments_of,
    check_machine,
    warn_if_apart,
)
from colospec.target import Target
from tests import tiny
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


def test_greedy_proposals_are_the_most_likely_tokens(untrained: Untrained) -> None:
    (prompt,) = random_prompts(1, vocab_size=untrained.target.vocab_size, seed=3)
    untrained.decoder.start(untrained.drafter.aux_layer_ids)
    logits, aux = untrained.decoder.forward(prompt)
    known = torch.cat([prompt, logits[-1:].argmax(-1)])
    proposals = []
    for drafter, temperature in (
        (untrained.drafter, 0.0),
        (GreedyProposals(untrained.drafter), 1.0),
    ):
        sampler = Sampler(temperature, seed=1, device=torch.device("cpu"))
        drafter.start()
        proposals.append(drafter.propose(known, aux, num_tokens=K, sampler=sampler))
    assert torch.equal(proposals[0].token_ids, proposals[1].token_ids)
    assert torch.equal(proposals[0].probabilities, proposals[1].probabilities)


def accepted_by(rows: list[tuple[list[int], list[int]]]) -> Acceptance:
    result = Acceptance(K, 0.0)
    result.num_reached = [0] * K
    for output, accepted in rows:
        result.add_prompt(output, accepted)
    return result


def both_ways(drafted: Acceptance) -> ThroughSglang:
    plain = accepted_by([(output, []) for output in drafted.outputs])
    for one in (plain, drafted):
        one.num_tokens, one.seconds = 10, 2.0
    return ThroughSglang(
        Served("0.5.17", {}, [ServedRun(1, drafted)]), Served("0.5.17", {}, [ServedRun(1, plain)])
    )


def test_only_prompts_with_the_same_text_are_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = accepted_by([([1, 2], [5, 4]), ([3, 4], [0, 0, 0])])
    same = both_ways(accepted_by([([1, 2], [5, 4]), ([3, 9], [5])]))
    with caplog.at_level("WARNING", logger="colospec"):
        warn_if_apart(same, loop)
        assert not caplog.records
        warn_if_apart(both_ways(accepted_by([([1, 2], [5, 3]), ([3, 9], [5])])), loop)
    assert "accepts 5.000 and our loop 5.500 tokens per step on the 1 of 2" in caplog.text

    (numbers,) = same.to_dict(loop, None)["runs"]
    assert numbers["acceptance_length"] == pytest.approx(1 + 14 / 3)
    assert numbers["num_same_text_as_loop"] == 1
    assert numbers["num_lossless"] == 2
    assert numbers["speedup"] == 1.0
    assert same.table(loop, None).row_count == 1


def test_the_command_reports_sglang_beside_our_loop(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Everything but SGLang itself."""
    data = tiny.write_data(tmp_path / "rows.jsonl", num_rows=10)
    target = Target.load(tiny.write_target(tmp_path / "target"))
    exported(tmp_path / "draft", target, Eagle3Config(ttt_length=2))
    jobs = []

    def pretend(job: ServingJob) -> Served:
        jobs.append(job)
        runs = []
        for temperature in job.temperatures:
            for size in job.batch_sizes:
                one = accepted_by([([1], [1, 0])] * len(job.prompts))
                one.temperature, one.num_tokens, one.seconds = temperature, 8, 1.0
                runs.append(ServedRun(size, one))
        return Served("0.5.17", {"page_size": 1}, runs)

    monkeypatch.setattr(through, "serve", pretend)
    monkeypatch.setattr(command, "check_machine", lambda *_: None)
    words = {
        "target": target.path,
        "draft": tmp_path / "draft",
        "prompts": data,
        "num-prompts": 2,
        "max-new-tokens": 6,
        "chain-length": 3,
        "temperature": 0.5,
        "through": "sglang",
        "batch-sizes": "2,5",
        "device": "cpu",
        "json": tmp_path / "out.json",
    }
    command.main([word for key, value in words.items() for word in (f"--{key}", str(value))])

    drafted, plain = jobs
    assert drafted.speculative["speculative_num_steps"] == 3
    assert plain.speculative == {}
    assert (drafted.batch_sizes, drafted.temperatures) == ([2, 5], [0.0, 0.5])
    assert [len(prompt) > 0 for prompt in drafted.prompts] == [True, True]
    report = json.loads((tmp_path / "out.json").read_text())["through_sglang"]
    assert [run["acceptance_length"] for run in report["runs"]] == [1.5] * 4
    assert report["loop_with_greedy_proposals"]["temperature"] == 0.5
    assert "through SGLang 0.5.17" in capfd.readouterr().err


# --- what SGLang does not serve


def exported(path: Path, target: Target, config: DraftConfig) -> tuple[DraftModel, Path]:
    model = registry.build(config, target, token_counts=torch.rand(target.vocab_size))
    export_draft(model.state_dict(), path, config=config, target=target, facts={})
    return model, path


def test_a_chain_is_served_at_any_length(untrained: Untrained, tmp_path: Path) -> None:
    model, path = exported(tmp_path / "draft", untrained.target, Eagle3Config())

    arguments = arguments_of(model, path, 4)

    assert arguments["speculative_algorithm"] == "EAGLE3"
    assert arguments["speculative_num_draft_tokens"] == 5
    assert arguments["speculative_draft_model_path"] == str(path)


def test_blocks_are_served_whole(untrained: Untrained, tmp_path: Path) -> None:
    config = DFlashConfig(num_layers=1, block_size=4)
    model, path = exported(tmp_path / "draft", untrained.target, config)

    assert arguments_of(model, path, 3)["speculative_num_draft_tokens"] == 4
    with pytest.raises(ValueError, match="--chain-length 3, not 2"):
        arguments_of(model, path, 2)


def test_a_draft_of_another_layout_is_named(untrained: Untrained, tmp_path: Path) -> None:
    model, path = exported(tmp_path / "draft", untrained.target, Eagle3Config())
    contents = json.loads((path / "config.json").read_text())
    contents["architectures"] = ["SomethingElse"]
    (path / "config.json").write_text(json.dumps(contents))

    with pytest.raises(ValueError, match="architecture is SomethingElse"):
        arguments_of(model, path, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_without_a_gpu_the_command_says_what_it_needs(untrained: Untrained, tmp_path: Path) -> None:
    words = ["--target", str(untrained.target.path), "--draft", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"needs a CUDA GPU .* device is cpu; --through loop"):
        command.main([*words, "--prompts", str(tmp_path), "--through", "sglang"])


def pretend_hopper(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(through, "check_installation", lambda: version)


def test_a_float32_target_is_refused_before_it_is_loaded(
    untrained: Untrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_hopper(monkeypatch, "0.5.17 (patched)")
    cuda = torch.device("cuda")
    with pytest.raises(ValueError, match=r"do not compute in torch.float32.* --dtype bfloat16"):
        check_machine(Target.load(untrained.target.path), cuda)
    check_machine(Target.load(untrained.target.path, dtype="bfloat16"), cuda)


def test_another_version_is_refused_with_what_to_type(
    untrained: Untrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_hopper(monkeypatch, "0.5.16")
    target = Target.load(untrained.target.path, dtype="bfloat16")
    with pytest.raises(RuntimeError, match=r"0\.5\.16 is installed; pip install .*==0\.5\.17"):
        check_machine(target, torch.device("cuda"))


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
        assert run.acceptance.seconds > 0
    first, second = (run.acceptance.num_tokens for run in result.runs)
    assert (first, second) == (plain.num_tokens, plain.num_tokens)
    assert children() <= before


@needs_sglang_on_cpu
def test_a_failing_child_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no draft ended with code 1 \(loading the models\)"):
        serve(make_job(tmp_path))


def test_a_child_that_is_silent_is_ended_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "START_S", 0.2)
    before, began = children(), time.monotonic()
    with pytest.raises(RuntimeError, match=r"within 0 s \(loading the models\)"):
        serve(make_job(targets.save(tmp_path, "Qwen3")))
    assert time.monotonic() - began < 20
    assert children() <= before
