"""The step benchmark on a GPU: both paths of every algorithm, and they agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from colospec.draft import catalog
from tests.gpu.machine import needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus(1)]

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def test_all_algorithms_are_measured_with_and_without_kernels(tmp_path):
    out = tmp_path / "step-tiny.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_step.py", "--tiny", "--repeats", "2", "--out", out],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["draft"], row["path"]) for row in rows] == [
        (name, way) for name in catalog.algorithms() for way in ("kernels", "plain")
    ]
    assert all((row["skipped"], row["failed"]) == ({}, {}) for row in rows)
    assert all(row["peak_gib"] > 0 and row["with_optimizer_s"] > 0 for row in rows)
    for kernels, plain in zip(rows[::2], rows[1::2], strict=True):
        assert kernels["kernels"][0]["ms"] > 0
        assert kernels["loss"] == pytest.approx(plain["loss"], rel=3e-2), kernels["draft"]
