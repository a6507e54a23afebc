"""The ring benchmark runs, on a CPU and in small; its record makes the table."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def test_the_benchmark_measures_every_transport_and_its_record_makes_the_table(
    tmp_path, monkeypatch
):
    out = tmp_path / "ring-cpu.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_ring.py", "--tiny", "--out", out, "--commit", "abc"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(out.read_text())
    assert set(record) == {"benchmark", "machine", "commit", "command", "rows"}
    assert record["commit"] == "abc"
    figures = ("gb_per_s", "latency_ms", "latency_p99_ms", "stall_ms")
    assert all(row[name] > 0 for row in record["rows"] for name in figures)
    assert all(row["latency_ms"] <= row["latency_p99_ms"] for row in record["rows"])

    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_ring
    import tables

    assert [row["transport"] for row in record["rows"]] == list(bench_ring.TRANSPORTS)
    head, rule, *rows = tables.ring_table(tmp_path).splitlines()
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    assert rows[0].startswith("| ring | 1 |")


def test_the_gpu_benchmark_says_what_it_needs(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_ring_gpu.py", "--out", tmp_path / "record.json"],
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs a CUDA GPU" in done.stderr
