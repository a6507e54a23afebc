"""The step benchmark measures every algorithm, and loses nothing when one of them fails."""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colospec.draft import catalog, registry
from colospec.draft.kernels import choice

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_step
    import step_case
    import step_draft
    import step_table

    return SimpleNamespace(step=bench_step, case=step_case, draft=step_draft, table=step_table)


def measure(bench, name, *, ways=("plain",), spoil=None, deadline=math.inf):
    """Measure a tiny draft in this process; `spoil` is called before each step. Returns the
    measurement, and what was sent."""
    case = bench.case
    made = case.Case(
        case.draft_config(name, [], tiny=True), case.make_target(tiny=True), case.TINY_LENGTHS, CPU
    )
    if spoil is not None:
        step = made.step
        made.step = lambda: (spoil(), step())[1]
    plan = bench.draft.Plan(name, (), is_tiny=True, repeats=1, deadline=deadline)
    sent = []
    measurement = bench.draft.Measurement(plan, made, ways, sent.append)
    measurement.run()
    return measurement, sent


@pytest.mark.parametrize("name", catalog.algorithms())
def test_each_algorithm_learns_from_what_it_asks_for(bench, name):
    measurement, sent = measure(bench, name)
    case, row = measurement.case, measurement.rows["plain"]
    assert (row["skipped"], row["failed"]) == ({}, {})
    assert row["step_s"] > 0
    assert row["samples_per_s"] == pytest.approx(3 / row["with_optimizer_s"])
    assert math.isfinite(row["loss"])
    spec = registry.features(case.config, case.target)
    given = case.batch.features
    assert given.aux_hidden_states.shape == (54, 64 * len(spec.aux_layer_ids))
    assert (given.last_hidden_states is not None) == spec.last_hidden_states
    facts = sent[0][1]
    assert facts["settings"]["algorithm"] == name
    assert ("step_tflop_per_s" in row) == ("step" in facts["tera_flops"])


def test_eagle3_is_also_measured_in_parts(bench):
    measurement, sent = measure(bench, "eagle3")
    parts = {"loss", "attention", "layer"}
    assert all(measurement.rows["plain"][f"{part}_s"] > 0 for part in parts)
    tera = sent[0][1]["tera_flops"]
    assert set(tera) == {"step", *parts}
    assert 0.9 * tera["step"] < sum(tera[part] for part in parts) < tera["step"]


def test_what_has_no_memory_on_the_plain_path_is_skipped_and_the_rest_goes_on(bench):
    original = choice.fused

    def spoil():
        if choice.fused is not original:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99.00 GiB.")

    measurement, sent = measure(bench, "dflash", ways=("kernels", "plain"), spoil=spoil)
    kernels, plain = measurement.rows["kernels"], measurement.rows["plain"]
    assert kernels["with_optimizer_s"] > 0
    assert (kernels["skipped"], kernels["failed"]) == ({}, {})
    assert set(plain["skipped"]) == {"step", "with optimizer"}
    assert "99.00 GiB" in plain["skipped"]["step"]
    assert "step_s" not in plain
    assert [kind for kind, _ in sent[:2]] == ["facts", "row"]


def test_what_fails_is_told_and_the_rest_goes_on(bench):
    calls = []

    def spoil():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no such kernel")

    row = measure(bench, "peagle", spoil=spoil)[0].rows["plain"]
    assert row["failed"] == {"step": "RuntimeError: no such kernel"}
    assert row["with_optimizer_s"] > 0


def test_nothing_begins_behind_the_deadline(bench):
    row = measure(bench, "eagle3", deadline=time.monotonic())[0].rows["plain"]
    assert set(row["skipped"]) == {"step", "parts", "with optimizer"}


def test_a_process_that_does_not_end_is_ended_and_named(bench):
    arguments = argparse.Namespace(overrides=[], tiny=True, repeats=1)
    facts, (row, *_) = bench.step.run_draft(arguments, "dflash", 0.3)
    assert "had not ended after 0" in row["failed"]["process"]
    assert facts["seconds"] < 10


def test_a_failing_algorithm_does_not_lose_the_others_record(bench, tmp_path):
    out = tmp_path / "step-tiny.json"
    command = [sys.executable, BENCHMARKS / "bench_step.py", "--tiny", "--out", out]
    done = subprocess.run(
        [*command, "--repeats", "1", "--draft", "dflash,eagle3", "draft.ttt_length=2"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "not all of dflash could be measured" in done.stderr
    assert "ttt_length" in done.stderr
    record = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "command", "shape"} <= set(record)
    assert record["drafts"]["eagle3"]["settings"]["ttt_length"] == 2
    rows = {row["draft"]: row for row in record["rows"]}
    assert "exit code 1" in rows["dflash"]["failed"]["process"]
    assert rows["eagle3"]["with_optimizer_s"] > 0

    head, rule, failed, measured, *_ = bench.table.step_table(tmp_path).splitlines()
    assert head.count("|") == rule.count("|") == failed.count("|") == measured.count("|")
    assert failed == "| dflash |" + " - |" * (head.count("|") - 2)
    assert measured.startswith("| eagle3 | 0 |")


def test_a_record_of_eagle3_alone_makes_no_table(bench, tmp_path):
    old = {"benchmark": "step", "rows": [{"path": "kernels", "step_s": 0.2}]}
    (tmp_path / "step-gpu.json").write_text(json.dumps(old))
    assert bench.table.step_table(tmp_path) is None


def test_unknown_algorithms_are_refused(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--tiny", "--draft", "eagle9"])
    with pytest.raises(SystemExit):
        bench.step.parse()
    assert "eagle9 is unknown; choose of dflash" in capsys.readouterr().err


def test_the_table_compares_the_paths_of_each_algorithm(bench, tmp_path):
    kernels = {
        "step_s": 0.466, "with_optimizer_s": 0.481, "samples_per_s": 8.316, "peak_gib": 20.0,
        "with_optimizer_peak_gib": 38.25, "step_tflop_per_s": 602.2,
    }  # fmt: skip
    skipped = {"step": "CUDA out of memory. Tried to allocate 99.00 GiB.", "with optimizer": "same"}
    rows = [
        {"draft": "one", "path": "kernels", "skipped": {}, "failed": {}, **kernels},
        {"draft": "one", "path": "plain", "skipped": {}, "failed": {}, "step_s": 1.129},
        {"draft": "two", "path": "kernels", "skipped": {}, "failed": {}, "step_s": 0.1},
        {"draft": "two", "path": "plain", "skipped": skipped, "failed": {}},
    ]
    record = {
        "machine": {"gpu": "NVIDIA X", "torch": "2.11"}, "commit": "abc", "rows": rows,
        "shape": {"documents": [2048] * 4}, "drafts": {"one": {"parameters": 1048.6e6}, "two": {}},
    }  # fmt: skip
    (tmp_path / "step-x.json").write_text(json.dumps(record))
    _, _, one, two, _, note = bench.table.step_table(tmp_path).splitlines()
    assert one == "| one | 1,049 | 466 | 1,129 | 481 | 8.32 | 602 | 38.2 |"
    assert two == "| two | - | 100 | out of memory | - | - | - | - |"
    assert "NVIDIA X" in note
    assert "4 samples of 2048 tokens" in note


@pytest.mark.usefixtures("bench")
def test_a_tiny_run_is_kept_only_where_out_says(monkeypatch, tmp_path):
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    parser = record.parser("", tiny="small")
    record.write({}, parser.parse_args(["--tiny"]), name="a.json")
    record.write({}, parser.parse_args([]), name=None)
    assert not list(tmp_path.rglob("*.json"))
    record.write({}, parser.parse_args([]), name="a.json")
    record.write({}, parser.parse_args(["--tiny", "--out", str(tmp_path / "b.json")]), name="a")
    assert {file.name for file in tmp_path.rglob("*.json")} == {"a.json", "b.json"}
