"""Drafts of the demo target through SGLang's own speculative decoding, beside our loop."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colospec.demo import ensure_data, ensure_target
from tests.gpu import machine
from tests.jobs.start import job

pytestmark = [
    pytest.mark.gpu,
    machine.needs_gpus(1),
    pytest.mark.timeout(500),
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None,
        reason="wants SGLang: pip install --no-deps -r constraints/sglang-0.5.17.txt",
    ),
]

CHAIN_LENGTH = {"eagle3": 5, "dflash": 7}
EXPERIMENT = {"eagle3": "demo", "dflash": "demo_dflash"}
NUM_PROMPTS = 64
# Near-ties of bfloat16 turn with the shape of a batch, and then the texts differ.
SAME_TEXTS = 0.8


def in_shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.fixture(scope="module", params=list(CHAIN_LENGTH))
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train a draft as the demo does, and measure its export as a user does."""
    kind = request.param
    root = tmp_path_factory.mktemp(kind)
    target, data = ensure_target(), ensure_data()
    choices = [f"draft={kind}", f"+experiment={EXPERIMENT[kind]}", f"run_dir={root / 'run'}"]
    job(2, "+mode=colocate", *choices, timeout_s=200)
    before = in_shared_memory()
    words = {
        "--target": target,
        "--draft": root / "run" / "export",
        "--prompts": data.eval_path,
        "--num-prompts": NUM_PROMPTS,
        "--dtype": "bfloat16",
        "--chain-length": CHAIN_LENGTH[kind],
        "--temperature": 1,
        "--through": "sglang",
        "--json": root / "report.json",
    }
    flat = [str(word) for pair in words.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-m", "colospec.evaluate", *flat],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "report.json").read_text())
    return found | {"left": in_shared_memory() - before, "printed": done.stderr}


def runs(report: Any, temperature: float) -> list[dict[str, Any]]:
    return [r for r in report["through_sglang"]["runs"] if r["temperature"] == temperature]


def test_greedy_acceptance_is_that_of_our_loop(report: Any) -> None:
    real = report["drafters"]["draft"]["greedy"]["acceptance_length"]
    assert real > 1.2
    for run in runs(report, 0.0):
        assert run["acceptance_length"] == pytest.approx(real, rel=0.03)
    assert "the export may be wrong" not in report["printed"]


def test_each_position_is_accepted_as_often_as_in_our_loop(report: Any) -> None:
    real = report["drafters"]["draft"]["greedy"]["cumulative_rates"]
    for run in runs(report, 0.0):
        assert run["cumulative_rates"] == pytest.approx(real, abs=0.03)


def test_sampled_acceptance_is_that_of_greedy_proposals(report: Any) -> None:
    loop = report["through_sglang"]["loop_with_greedy_proposals"]["acceptance_length"]
    for run in runs(report, 1.0):
        assert run["acceptance_length"] == pytest.approx(loop, rel=0.1)


def test_the_draft_does_not_change_greedy_text(report: Any) -> None:
    for run in runs(report, 0.0):
        assert run["num_equal_to_plain"] >= SAME_TEXTS * NUM_PROMPTS


def test_speed_is_measured_with_and_without_the_draft_at_every_batch_size(report: Any) -> None:
    assert [run["batch_size"] for run in runs(report, 0.0)] == [1, 8, 32]
    for run in report["through_sglang"]["runs"]:
        assert run["speedup"] == pytest.approx(run["tokens_per_s"] / run["plain_tokens_per_s"])
    with_batch = [run["plain_tokens_per_s"] for run in runs(report, 0.0)]
    assert with_batch == sorted(with_batch)


def test_nothing_is_left_behind(report: Any) -> None:
    assert not report["left"]
    mine = Path("/proc").glob("[0-9]*/cmdline")
    assert not [p for p in mine if b"colospec.engine.sglang_serving" in read(p)]


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it ended
        return b""
