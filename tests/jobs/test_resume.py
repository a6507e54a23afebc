"""A run that was killed and started again is, to the last bit, the run that was not."""

import os
import random
import signal
import time

import pytest
import torch

from colospec.checkpoint.manifest import open_checkpoint
from colospec.checkpoint.state import load_model
from tests import tiny
from tests.jobs.start import job, losses, wait_for
from tests.torchrun import command, pids_of, started

STEPS = 24
WORDS = ["trainer.epochs=9", f"trainer.max_steps={STEPS}", "trainer.save_interval=4"]


def weights(run_dir, step=STEPS):
    return load_model(run_dir / "checkpoint" / f"step-{step:06d}")


@pytest.fixture(scope="module")
def few_job(tiny_job, tmp_path_factory):
    """The tiny job on so few rows that an epoch has about ten micro-batches."""
    data = tiny.write_data(tmp_path_factory.mktemp("few") / "few.jsonl", num_rows=40)
    return [*tiny_job, f"data.path={data}"]


@pytest.fixture(scope="module")
def whole(few_job, tmp_path_factory):
    """A run over several epochs that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    job(2, "+mode=colocate", *few_job, *WORDS, f"run_dir={run_dir}")
    return run_dir


def test_the_run_crosses_epoch_borders(whole):
    (newest,) = (whole / "checkpoint").glob(f"step-{STEPS:06d}")
    assert open_checkpoint(newest).manifest.meta["epoch"] >= 2


def same(run_dir, whole):
    assert losses(run_dir) == losses(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(run_dir)[name]), name


def kill_after(words, wait, pick):
    """Start a job, wait as told, SIGKILL the picked processes; all must be gone in 5 s."""
    with started(words) as process:
        wait(process)
        pids = pick(process)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=15)
        deadline = time.monotonic() + 5
        while pids_of(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not pids_of(process)
    return process.returncode


# The checkpoint of step 4 is whole once that of step 8 is begun.
@pytest.mark.parametrize("after_step", [9, pytest.param(13, marks=pytest.mark.slow)])
def test_everything_killed_at_once_and_started_again_gives_the_same_run(
    whole, few_job, tmp_path, after_step
):
    run_dir = tmp_path / "run"
    words = [*few_job, *WORDS, f"run_dir={run_dir}"]
    line = f'"step": {after_step},'
    code = kill_after(
        command(2, "-m", "colospec.run", "+mode=colocate", *words),
        lambda process: wait_for(run_dir / "metrics.jsonl", line, process),
        pids_of,
    )
    assert code != 0
    output = job(2, "+mode=colocate", *words)
    assert "resume:" in output
    same(run_dir, whole)


def test_torchrun_restarts_and_resumes_by_itself(whole, few_job, tmp_path):
    run_dir = tmp_path / "run"
    words = command(2, "-m", "colospec.run", "+mode=colocate", *few_job, *WORDS,
                    f"run_dir={run_dir}")  # fmt: skip
    words.insert(words.index("--standalone") + 1, "--max-restarts=1")
    with started(words) as process:
        wait_for(run_dir / "metrics.jsonl", '"step": 9,', process)
        ranks = [pid for pid in pids_of(process) if pid != process.pid]
        os.kill(random.choice(ranks), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    same(run_dir, whole)


def test_a_run_goes_on_with_another_number_of_trainers_in_the_same_order(tiny_job, tmp_path):
    alone, run_dir = tmp_path / "alone", tmp_path / "run"
    job(2, "+mode=colocate", *tiny_job, f"trainer.max_steps={STEPS}", f"run_dir={alone}")
    words = [*tiny_job, f"run_dir={run_dir}"]
    job(2, "+mode=colocate", *words, "trainer.max_steps=8")
    job(4, "+mode=colocate", *words, f"trainer.max_steps={STEPS // 2 + 4}")
    # Two trainers take two micro-batches a step: loss of supervised tokens per step tells which.
    ours = losses(run_dir, "perf/loss_tokens_per_step")
    reference = losses(alone, "perf/loss_tokens_per_step")
    assert [ours[s] for s in range(1, 9)] == [reference[s] for s in range(1, 9)]
    pairs = [reference[s] + reference[s + 1] for s in range(9, STEPS, 2)]
    assert [ours[s] for s in range(9, 17)] == pairs


def test_another_run_in_the_same_directory_is_refused_with_the_settings_that_differ(whole, few_job):
    before = {path: path.read_bytes() for path in whole.rglob("*.json")}
    words = [*few_job, *WORDS, f"run_dir={whole}", "data.max_sequences=7", "draft.ttt_length=2"]
    output = job(2, "+mode=colocate", *words, expect="error")
    assert "data.max_sequences: 128 -> 7" in output
    assert "draft.ttt_length: 3 -> 2" in output
    assert {path: path.read_bytes() for path in whole.rglob("*.json")} == before
    assert not (whole / ".hydra").exists(), "whose settings were they?"


def test_resume_never_refuses_a_directory_that_has_a_run(whole, few_job):
    words = [*few_job, *WORDS, f"run_dir={whole}", "resume=never"]
    output = job(2, "+mode=colocate", *words, expect="error")
    assert "resume=auto" in output


@pytest.mark.slow
def test_twenty_random_kills_of_anything_change_nothing(whole, few_job, tmp_path):
    run_dir = tmp_path / "run"
    words = [*few_job, *WORDS, f"run_dir={run_dir}", "trainer.save_interval=1"]
    start = command(2, "-m", "colospec.run", "+mode=colocate", *words)
    for _ in range(20):
        pause = random.uniform(4, 14)
        kill_after(
            start,
            lambda _, pause=pause: time.sleep(pause),
            lambda process: random.choice([pids_of(process), pids_of(process)[-1:]]),
        )
    job(2, "+mode=colocate", *words)
    same(run_dir, whole)
