"""What a job lays out: its steps, what is evaluated between them, and whose part is whose."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from colospec import dry_run
from colospec.config import DataConfig, Mode, RunConfig, TargetConfig, TrainerConfig
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.eagle3.config import Eagle3Config
from colospec.topology import build
from colospec.train.job import Job, Start
from colospec.train.provenance import plain
from colospec.train.same_run import check_same_run
from tests import tiny

STEPS = 11


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> RunConfig:
    root: Path = tmp_path_factory.mktemp("job")
    return RunConfig(
        mode=Mode.colocate,
        target=TargetConfig(path=str(tiny.write_target(root / "target"))),
        draft=Eagle3Config(draft_vocab_size=None),
        data=DataConfig(
            path=str(tiny.write_data(root / "train.jsonl", num_rows=60)),
            cache_dir=str(root / "cache"),
            max_length=300, token_budget=300, num_workers=1, held_out_samples=7,
        ),
        trainer=TrainerConfig(max_steps=STEPS, eval_interval=4, probe_interval=3, probe_tokens=9),
    )  # fmt: skip


def load(run: RunConfig, trainers: int = 2) -> Job:
    return Job.load(run, num_trainers=trainers, progress=False)


def test_an_error_of_the_held_out_data_names_its_setting(run: RunConfig) -> None:
    data = replace(run.data, held_out_samples=0, held_out_path="/nowhere.jsonl")
    with pytest.raises(ValueError, match=r"^data\.held_out_path=/nowhere\.jsonl does not exist"):
        load(replace(run, data=data))


def test_no_micro_batch_has_more_blocks_than_the_draft_allows(run: RunConfig) -> None:
    config = DFlashConfig(num_anchors=8, max_blocks=16)
    job = load(replace(run, draft=config))
    held_out = job.held_out
    assert held_out is not None
    train = [part for step in job.steps(Start()) for part in step.bins]
    for dataset, bins in ((job.dataset, train), (held_out.dataset, held_out.bins)):
        most = [np.minimum(dataset.num_loss_tokens[list(part)], 8).sum() for part in bins]
        assert 0 < max(most) <= 16
    unlimited = chain.from_iterable(step.bins for step in load(run).steps(Start()))
    assert max(map(len, train)) < max(map(len, unlimited))


def due(job: Job, start: Start) -> dict[int, tuple[bool, bool]]:
    """Steps done -> whether held-out samples are evaluated, whether a probe is due."""
    return {
        evaluation.step + 1: (bool(evaluation.bins), evaluation.has_probe)
        for _, evaluation in job.work(start)
        if evaluation is not None
    }


def test_evaluations_follow_every_interval_and_the_last_step(run: RunConfig) -> None:
    expected = {
        3: (False, True), 4: (True, False), 6: (False, True), 8: (True, False), 9: (False, True),
        11: (True, True),
    }  # fmt: skip
    job = load(run)
    assert due(job, Start()) == expected
    steps = [step for step, _ in job.work(Start())]
    assert steps == list(job.steps(Start()))
    seventh = Start(steps[6].next_epoch, steps[6].next_micro_batch, 7)
    assert due(job, seventh) == {step: one for step, one in expected.items() if step > 7}


@pytest.mark.parametrize("done", [4, 11])
def test_an_evaluation_that_is_owed_comes_before_the_next_step(run: RunConfig, done: int) -> None:
    job = load(run)
    whole = list(job.work(Start()))
    step, evaluation = whole[done - 1]
    assert step is not None
    assert evaluation is not None
    start = Start(step.next_epoch, step.next_micro_batch, done, owes_evaluation=True)
    (nothing, owed), *rest = job.work(start)
    assert nothing is None
    assert owed is not None
    assert owed.bins == evaluation.bins
    assert (owed.step, owed.has_probe) == (evaluation.step, evaluation.has_probe)
    assert rest == whole[done:]


@pytest.mark.parametrize("trainers", [1, 2, 3, 5])
def test_trainers_bring_the_same_number_of_held_out_micro_batches(
    run: RunConfig, trainers: int
) -> None:
    job = load(run, trainers)
    evaluation = next(e for _, e in job.work(Start()) if e is not None and e.bins)
    parts = [list(job.micro_batches(evaluation, rank)) for rank in range(trainers)]
    assert len({len(part) for part in parts}) == 1
    assert job.held_out is not None
    brought = chain.from_iterable(tokens.sample_ids for part in parts for tokens in part)
    assert sorted(brought) == list(job.held_out.sample_ids)
    masks = sum(int(tokens.loss_mask.sum()) for part in parts for tokens in part)
    assert masks == evaluation.num_loss_tokens


def test_no_step_holds_a_held_out_sample(run: RunConfig) -> None:
    job = load(run)
    assert job.held_out is not None
    trained = {sample for step in job.steps(Start()) for one in step.bins for sample in one}
    assert trained
    assert not trained & set(job.held_out.sample_ids)


def test_a_run_that_goes_on_may_evaluate_otherwise_but_not_hold_out_other_samples(
    run: RunConfig,
) -> None:
    saved, digest = plain(run), load(run).plan.digest
    other = replace(run, trainer=replace(run.trainer, eval_interval=2, probe_interval=0))
    check_same_run(other, saved, load(other).plan.digest, digest)
    fewer = replace(run, data=replace(run.data, held_out_samples=6))
    with pytest.raises(ValueError, match=r"data\.held_out_samples: 7 -> 6"):
        check_same_run(fewer, saved, load(fewer).plan.digest, digest)
    assert run.data.path is not None
    own = replace(run, data=replace(run.data, held_out_path=run.data.path))
    with pytest.raises(ValueError, match="its plan has another digest"):
        check_same_run(own, saved, "another", digest)


def test_a_run_that_goes_on_may_change_its_block_limit_where_that_moves_no_sample(
    run: RunConfig,
) -> None:
    def with_limit(blocks: int) -> tuple[RunConfig, str]:
        some = replace(run, draft=DFlashConfig(num_anchors=8, max_blocks=blocks))
        return some, load(some).plan.digest

    begun, digest = with_limit(300)
    more, same = with_limit(400)
    check_same_run(more, plain(begun), same, digest)
    fewer, other = with_limit(16)
    with pytest.raises(ValueError, match=r"draft\.max_blocks \(its plan has another digest\)"):
        check_same_run(fewer, plain(begun), other, digest)


@pytest.mark.parametrize(("blocks", "says"), [(16, "% (by draft.max_blocks), "), (400, "%, ")])
def test_a_dry_run_says_what_keeps_micro_batches_from_filling(
    run: RunConfig, monkeypatch: Any, blocks: int, says: str
) -> None:
    monkeypatch.setattr(dry_run, "console", Console(file=io.StringIO(), width=1000))
    some = replace(run, draft=DFlashConfig(num_anchors=8, max_blocks=blocks))
    dry_run.show(some, build(Mode.colocate, world_size=4, local_world_size=4, visible_gpus=0))
    (line,) = re.findall("fill rate.*", dry_run.console.file.getvalue())  # type: ignore[attr-defined]
    assert re.match(rf"fill rate [0-9.]+{re.escape(says)}features", line)
