"""The colocation benchmark runs, on a CPU and in small; its records make tables."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.mark.slow
def test_the_benchmark_measures_each_role_alone_and_both_together(tmp_path, monkeypatch):
    out = tmp_path / "colocate-tiny.json"
    script = BENCHMARKS / "bench_colocate.py"
    done = subprocess.run(
        [sys.executable, script, "--tiny", "--gpus", "2", "--out", out],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(out.read_text())
    figures = record["figures"]
    assert set(figures["samples_per_s_windows"]) == {"engine", "trainer", "both"}
    assert all(len(rates) == 2 for rates in figures["samples_per_s_windows"].values())
    assert 0.2 < figures["sum_of_shares"] < 2.5
    assert figures["kept_share"] == 1.0
    # Two trainers with four documents of 64 tokens each, three steps of training-time test.
    assert figures["supervised_positions_per_step"] == 2 * 4 * (62 + 61 + 60)
    assert set(figures["step_s"]) >= {"engine", "transport", "wait", "forward", "backward"}
    assert all(loss > 0 for loss in figures["loss"])

    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    assert tables.dflash_table(tmp_path) is None
    out.write_text(json.dumps(record | {"cell": "qwen3_8b"}))
    for table in (tables.colocate_table, tables.split_table):
        head, rule, *rows = table(tmp_path).splitlines()
        assert head.count("|") == rule.count("|") == rows[0].count("|")
        assert rows[0].startswith("| 2 | time slicing |")
    assert tables.original_table(tmp_path) is None
    out.write_text(json.dumps(record | {"cell": "dflash"}))
    head, rule, row, *_ = tables.dflash_table(tmp_path).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")


def test_a_dflash_cell_supervises_one_stretch_of_each_sample(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from workloads import CELLS, loss_mask

    lengths = np.array([2048, 2048, 300])
    mask = loss_mask(CELLS["dflash_70"], lengths, np.random.default_rng())
    parts = np.split(mask, lengths.cumsum()[:-1])
    assert [part.sum() for part in parts] == [361, 361, 299]
    assert all(np.ptp(np.flatnonzero(part)) + 1 == part.sum() for part in parts)
    assert not any(part[0] for part in parts)
