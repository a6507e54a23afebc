"""Whole runs that evaluate: they train as runs that do not, and go on after a kill as if nothing
had been."""

import json
import os
import signal
import time

import pytest
import torch

from colospec.checkpoint.manifest import open_checkpoint
from colospec.checkpoint.state import load_model
from tests import tiny
from tests.jobs.start import files, job, losses, rank_pid, wait_for
from tests.torchrun import command, pids_of, started

STEPS = 14
# Blocks begin at random anchors: the random state of training must not see the evaluations.
DRAFT = ["draft=dflash", *(f"draft.{word}" for word in ("num_layers=1", "block_size=4"))]
HELD_OUT = ["data.held_out_samples=12", f"trainer.max_steps={STEPS}"]
MEASURES = [
    "trainer.eval_interval=4", "trainer.probe_interval=6", "trainer.save_interval=4",
    "trainer.best_metric=eval/loss", "trainer.probe_prompts=2", "trainer.probe_tokens=9",
]  # fmt: skip


@pytest.fixture(scope="module")
def words(tiny_job):
    own = [word for word in tiny_job if not word.startswith("draft.")]
    return [*own, *DRAFT, "draft.num_anchors=8", *HELD_OUT]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The run directory and the console of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, job(2, "+mode=colocate", *words, *MEASURES, f"run_dir={run_dir}")


def measured(run_dir):
    """All that was measured on held-out samples, by step and name; not how long it took."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name.startswith(("eval/", "probe/")) and name != "probe/s"
    }


def assert_same_training(run_dir, other):
    assert losses(run_dir) == losses(other)
    assert len(losses(other)) == STEPS
    mine, theirs = (
        load_model(path / "checkpoint" / f"step-{STEPS:06d}") for path in (run_dir, other)
    )
    for name, weight in theirs.items():
        assert torch.equal(mine[name], weight), name


def test_evaluations_come_when_they_are_due_and_at_the_end(whole):
    run_dir, output = whole
    names = {name: set() for _, name in measured(run_dir)}
    for step, name in measured(run_dir):
        names[name].add(step)
    accuracies = {f"eval/acc_{place}" for place in range(3)}
    assert {"eval/loss", "eval/simulated_acceptance_length"} | accuracies <= names.keys()
    probed = {
        "real_acceptance_length",
        "simulated_acceptance_length",
        "exported_simulated_acceptance_length",
        "gap",
    }
    assert {name for name in names if name.startswith("probe/")} == {f"probe/{n}" for n in probed}
    for name, steps in names.items():
        assert steps == ({4, 8, 12, 14} if name.startswith("eval/") else {6, 12, 14}), name
    assert output.count("eval step ") == 4
    assert output.count("probe at step ") == 3


def test_held_out_loss_falls_and_the_best_checkpoint_is_chosen_by_it(whole):
    run_dir, _ = whole
    held_out = losses(run_dir, "eval/loss")
    assert held_out[14] < held_out[4]
    for step in (12, 14):
        manifest = open_checkpoint(run_dir / "checkpoint" / f"step-{step:06d}").manifest
        assert manifest.metrics["eval/loss"] == held_out[step]
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["objective"], result["objective_name"]) == (held_out[14], "eval/loss")


def test_the_draft_that_is_measured_is_the_one_that_comes_back_from_the_export(whole):
    run_dir, output = whole
    values = measured(run_dir)
    for step in (6, 12, 14):
        lengths = [
            values[step, f"probe/{name}"]
            for name in ("real_acceptance_length", "simulated_acceptance_length")
        ]
        assert all(1 <= length <= 4 for length in lengths)
        exported = values[step, "probe/exported_simulated_acceptance_length"]
        assert exported == pytest.approx(lengths[1], rel=0.05), "rounded to bfloat16, no more"
    assert "export bug" not in output
    assert not files(run_dir / "probe"), "the exports of probes without an alarm are gone"


def test_a_run_without_evaluations_has_the_same_losses_and_weights(whole, words, tmp_path):
    run_dir = tmp_path / "run"
    job(2, "+mode=colocate", *words, f"run_dir={run_dir}")
    assert not measured(run_dir)
    assert_same_training(run_dir, whole[0])


def test_alternate_mode_measures_the_same(whole, words, tmp_path):
    run_dir = tmp_path / "run"
    job(1, "+mode=alternate", *words, *MEASURES, f"run_dir={run_dir}")
    assert measured(run_dir) == measured(whole[0])
    assert_same_training(run_dir, whole[0])


def test_a_run_killed_between_evaluations_goes_on_as_if_it_had_not_been(whole, words, tmp_path):
    run_dir = tmp_path / "run"
    start = command(2, "-m", "colospec.run", "+mode=colocate", *words, *MEASURES,
                    f"run_dir={run_dir}")  # fmt: skip
    with started(start) as process:
        wait_for(run_dir / "metrics.jsonl", '"step": 9,', process)
        for pid in pids_of(process):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=15)
    output = job(2, "+mode=colocate", *words, *MEASURES, f"run_dir={run_dir}")
    assert "resume:" in output
    assert measured(run_dir) == measured(whole[0])
    assert_same_training(run_dir, whole[0])


def test_sigterm_ends_a_long_evaluation_and_the_next_run_makes_it(words, tmp_path):
    """Whoever stops a job may kill it a few seconds later. Here it is stopped while two trainers
    evaluate, and, when it goes on, in the probe that follows its last step."""
    many = tiny.write_data(tmp_path / "many.jsonl", num_rows=300, seed=1)
    own = [*words, "trainer.accumulation=1", f"data.held_out_path={many}",
           "data.held_out_samples=240",
           "trainer.eval_interval=8", "trainer.probe_interval=14", "trainer.probe_prompts=4",
           "trainer.probe_tokens=60", "trainer.save_interval=7"]  # fmt: skip
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    job(4, "+mode=colocate", *own, f"run_dir={whole}")
    start = command(4, "-m", "colospec.run", "+mode=colocate", *own, f"run_dir={stopped}")
    for step, file, line in (
        (8, "metrics.jsonl", '"step": 8,'), (STEPS, "log/rank0.log", "phase probe"),
    ):  # fmt: skip
        with started(start) as process:
            wait_for(stopped / file, line, process)
            engine = rank_pid(process, 1)
            os.kill(engine, signal.SIGSTOP)  # the evaluation cannot end
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
            os.kill(engine, signal.SIGCONT)
            output, _ = process.communicate(timeout=60)
        assert f"stopped after {step} steps, checkpoint saved" in output, output[-5000:]
        assert "error: " not in output, output[-5000:]
        reached = {at for at, _ in measured(stopped)}
        assert reached == (set() if step == 8 else {8}), "reported whole or not at all"
        assert files(stopped / "probe") == []
        assert not (stopped / "export").exists()
    job(4, "+mode=colocate", *own, f"run_dir={stopped}")
    assert measured(stopped) == measured(whole)
    assert_same_training(stopped, whole)
    last = open_checkpoint(stopped / "checkpoint" / f"step-{STEPS:06d}").manifest
    assert last.metrics.items() >= {
        name: value for (at, name), value in measured(whole).items() if at == STEPS
    }.items()  # fmt: skip
    assert not last.meta["owes_evaluation"]


def test_a_stop_reaches_an_engine_that_waits_for_the_next_probe(words, tmp_path):
    """The engine is ahead by the slots of the ring, and listens where the probe is due."""
    run_dir = tmp_path / "run"
    slow = ["trainer.max_steps=100000", "trainer.accumulation=10", "ring.num_slots=40"]
    start = command(2, "-m", "colospec.run", "+mode=colocate", *words, *slow,
                    "trainer.probe_interval=3", f"run_dir={run_dir}")  # fmt: skip
    with started(start) as process:
        wait_for(run_dir / "metrics.jsonl", '"step": 1,', process)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert "checkpoint saved; go on with run_dir" in output
    assert "error: " not in output


@pytest.mark.slow
def test_two_trainers_measure_what_one_measures(tiny_job, tmp_path):
    """Also with the last hidden states in the slots, and with trainers that have no held-out
    micro-batch of their own to bring."""
    runs = {}
    for ranks, accumulation in ((2, 2), (4, 1)):
        run_dir = tmp_path / str(ranks)
        words = [*tiny_job, "data.held_out_samples=3", "trainer.max_steps=3", "trainer.lr=1e-9"]
        words += [f"trainer.accumulation={accumulation}", "trainer.eval_interval=2"]
        words += ["trainer.probe_interval=3", "trainer.probe_tokens=9", f"run_dir={run_dir}"]
        job(ranks, "+mode=colocate", *words)
        runs[ranks] = measured(run_dir)
    assert runs[2].keys() == runs[4].keys()
    for key, value in runs[2].items():
        assert runs[4][key] == pytest.approx(value, rel=1e-5), key
