"""The comparison of SGLang with our loop, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import weakref
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
from colospec.evaluate import through
from colospec.evaluate.acceptance import Acceptance
from colospec.evaluate.drafters import GreedyProposals
from colospec.evaluate.sampling import Sampler
from colospec.evaluate.served import Served, ServedRun
from colospec.evaluate.target_decoder import TargetDecoder
from colospec.evaluate.through import (
    ThroughSglang,
    arguments_of,
    check_machine,
    warn_if_apart,
)
from colospec.target import Target
from tests import tiny
from tests.evaluate.models import Untrained, random_prompts

K = 5


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
        warn_if_apart("mine", same, loop)
        assert not caplog.records
        apart = both_ways(accepted_by([([1, 2], [5, 3]), ([3, 9], [5])]))
        warn_if_apart("mine", apart, loop)
    assert "mine: SGLang at batch size 1 accepts 5.000 and our loop 5.500 tokens" in caplog.text
    assert "on the 1 of 2 prompts" in caplog.text

    (numbers,) = same.to_dict(loop, None)["runs"]
    assert numbers["acceptance_length"] == pytest.approx(1 + 14 / 3)
    assert numbers["num_same_text_as_loop"] == 1
    assert numbers["num_lossless"] == 2
    assert numbers["speedup"] == 1.0
    assert same.table("mine", loop, None).row_count == 1


def test_without_a_common_text_there_is_no_length_to_compare() -> None:
    loop = accepted_by([([1, 2], [5, 4])])
    served = both_ways(accepted_by([([1, 9], [5, 4])]))

    (numbers,) = served.to_dict(loop, None)["runs"]

    assert numbers["num_same_text_as_loop"] == 0
    assert numbers["acceptance_length_on_same_text"] is None
    assert "- (0)" in list(served.table("mine", loop, None).columns[4].cells)


def test_the_command_reports_sglang_beside_our_loop(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Everything but SGLang itself."""
    data = tiny.write_data(tmp_path / "rows.jsonl", num_rows=10)
    target = Target.load(tiny.write_target(tmp_path / "target"))
    drafts = [str(tmp_path / name / "export") for name in ("one", "two")]
    for draft in drafts:
        exported(Path(draft), target, Eagle3Config(ttt_length=2))
    jobs = []
    decoders: list[weakref.ref[TargetDecoder]] = []

    class Known(TargetDecoder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            decoders.append(weakref.ref(self))

    def pretend(job: ServingJob) -> Served:
        jobs.append(job)
        assert [decoder() for decoder in decoders] == [None], "SGLang needs its memory"
        runs = []
        for temperature in job.temperatures:
            for size in job.batch_sizes:
                one = accepted_by([([1], [1, 0])] * len(job.prompts))
                one.temperature, one.num_tokens, one.seconds = temperature, 8, 1.0
                runs.append(ServedRun(size, one))
        return Served("0.5.17", {"page_size": 1}, runs)

    monkeypatch.setattr(through, "serve", pretend)
    monkeypatch.setattr(command, "TargetDecoder", Known)
    monkeypatch.setattr(command, "check_machine", lambda *_: None)
    words = {
        "target": target.path,
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
    flat = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    command.main(["--draft", *drafts, *flat])

    plain, drafted, other = jobs
    assert drafted.speculative["speculative_num_steps"] == 3
    assert other.speculative["speculative_draft_model_path"] == drafts[1]
    assert plain.speculative == {}
    assert (drafted.batch_sizes, drafted.temperatures) == ([2, 5], [0.0, 0.5])
    assert [len(prompt) > 0 for prompt in drafted.prompts] == [True, True]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["settings"]["draft"] == drafts
    assert list(report["drafters"]) == ["one/export", "two/export"]
    for one in report["drafters"].values():
        served = one["through_sglang"]
        assert [run["acceptance_length"] for run in served["runs"]] == [1.5] * 4
        assert served["loop_with_greedy_proposals"]["temperature"] == 0.5
    assert capfd.readouterr().err.count("through SGLang 0.5.17") == 2


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

    with pytest.raises(
        ValueError, match=r"architecture is SomethingElse, not Llama.* --format sglang"
    ):
        arguments_of(model, path, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_without_a_gpu_the_command_says_what_it_needs(untrained: Untrained, tmp_path: Path) -> None:
    words = ["--target", str(untrained.target.path), "--draft", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"needs a CUDA GPU .* device is cpu; --through loop"):
        command.main([*words, "--prompts", str(tmp_path), "--through", "sglang"])


def test_a_draft_that_is_given_twice_is_refused() -> None:
    words = ["--target", "T", "--prompts", "P", "--draft", "a/export", "b/../a/export"]
    with pytest.raises(SystemExit, match=r"a/export b/\.\./a/export: the same directory twice"):
        command.main(words)


@pytest.mark.parametrize(
    ("word", "value", "says"),
    [
        ("--batch-sizes", "8,0", "8,0 must be numbers from 1, like 1,8,32"),
        ("--dtype", "half", "choose from auto, float32"),
        ("--json", "nowhere/out.json", "no directory nowhere; mkdir -p nowhere"),
        ("--device", "gpu", "--device gpu cannot be used here"),
        ("--json", "/dev/null", "/dev/null is no regular file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], word: str, value: str, says: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--target", "T", "--draft", "D", "--prompts", "P", word, value])
    assert says in f"{stopped.value} {capsys.readouterr().err}".replace("'", "")


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
