"""Metrics are sums and counts until they are fetched, and files survive a resume."""

import json

import pytest
import torch

from colospec.metrics import JsonlTracker, Sums, open_trackers


def pair(total, count):
    return torch.tensor(float(total)), torch.tensor(float(count))


def test_means_weigh_every_micro_batch_by_its_count():
    sums = Sums()
    sums.add({"acc": pair(1, 1), "loss": pair(10, 5)})
    sums.add({"acc": pair(0, 3), "loss": pair(0, 0)})
    assert sums.fetch() == {"acc": 0.25, "loss": 2.0}
    assert sums.fetch() == {}


def test_a_count_of_zero_gives_zero_and_no_nan():
    sums = Sums()
    sums.add({"acc": pair(0, 0)})
    assert sums.fetch() == {"acc": 0.0}


def test_other_names_are_an_error_and_not_a_silent_zero():
    sums = Sums()
    sums.add({"acc": pair(1, 1)})
    with pytest.raises(ValueError, match="metrics changed"):
        sums.add({"loss": pair(1, 1)})


def test_metrics_file_drops_lines_past_the_step_that_a_run_resumes_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, first_step=0)
    for step in (10, 20, 30):
        tracker.log(step, {"train/loss": step / 10})
    tracker.close()
    tracker = JsonlTracker(path, first_step=20)
    tracker.log(30, {"train/loss": 9.0})
    tracker.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(10, 1.0), (20, 2.0), (30, 9.0)]


def test_metrics_file_drops_an_evaluation_that_is_made_once_more(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, first_step=0)
    for step in (1, 2):
        for name in ("train/loss", "eval/loss", "probe/gap"):
            tracker.log(step, {name: 1.0})
    tracker.close()
    for owes, left in ((False, 6), (True, 4)):
        JsonlTracker(path, first_step=2, owes_evaluation=owes).close()
        assert len(path.read_text().splitlines()) == left
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    assert [row["step"] for row in rows if "train/loss" not in row] == [1, 1]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra')
    JsonlTracker(path, first_step=5).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_values_that_are_not_finite_are_null_in_the_file(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", first_step=0)
    tracker.log(1, {"train/grad_norm": float("nan")})
    tracker.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["train/grad_norm"] is None


def test_missing_tracker_package_names_the_install_command(tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(RuntimeError, match=r"pip install 'colospec\[wandb\]'"):
            open_trackers("wandb", "p", tmp_path, {}, first_step=0)
