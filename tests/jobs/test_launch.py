"""The commands of the README, as typed."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from colospec import demo
from colospec.run import PATIENCE_S
from tests.jobs.start import job, losses
from tests.torchrun import ENV, command, free_port, pids_of, read_until, run, started

PYTHON = [sys.executable, "-m", "colospec.run"]


@pytest.fixture(scope="module")
def torchrun_on_path():
    """The console script beside this python, as a user with an active venv types it."""
    directory = Path(sys.executable).parent
    return {**ENV, "PATH": f"{directory}:{os.environ['PATH']}"}


@pytest.mark.parametrize("is_fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_bare_command_works_on_any_machine(torchrun_on_path, tmp_path, is_fresh):
    """On a fresh one it trains the demo's target first."""
    if not is_fresh:
        demo.ensure_target(tmp_path / "cache" / "colospec", num_steps=2)
    assert shutil.which("torchrun", path=torchrun_on_path["PATH"])
    words = "torchrun --nproc-per-node 8 -m colospec.run +mode=colocate trainer.max_steps=1"
    # Built here, beside other tests, the demo target is not one that the user should keep.
    env = {**torchrun_on_path, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, output, _ = run(words.split(), 280, env=env, cwd=tmp_path)
    assert code == 0, output[-4000:]
    (result,) = tmp_path.glob("outputs/*/*/result.json")
    assert json.loads(result.read_text())["steps"] == 1
    assert (result.parent / "export" / "model.safetensors").is_file()
    assert len(list((result.parent / "log").glob("rank*.log"))) == 8


def test_plain_python_starts_the_same_job(tiny_job, tmp_path):
    words = [*PYTHON, "+mode=colocate", *tiny_job, "trainer.max_steps=3", f"run_dir={tmp_path}/r"]
    code, output, _ = run(words, 100, cwd=tmp_path)
    assert code == 0, output[-4000:]
    assert "launch: torchrun --standalone --nproc-per-node=2 -m colospec.run" in output
    assert list(losses(tmp_path / "r")) == [1, 2, 3]
    kept = json.loads((tmp_path / "r" / "run.json").read_text())
    assert kept["world_size"] == 2
    assert kept["config"]["trainer"]["max_steps"] == 3


def test_two_launchers_make_one_job_of_two_nodes(tiny_job, tmp_path):
    endpoint = f"127.0.0.1:{free_port()}"
    words = [*PYTHON, "+mode=colocate", *tiny_job, "trainer.max_steps=3", "launch.nodes=2",
             f"launch.rdzv_endpoint={endpoint}", f"run_dir={tmp_path}/r"]  # fmt: skip
    with started(words, cwd=tmp_path) as second:
        code, output, _ = run(words, 120, cwd=tmp_path)
        rest, _ = second.communicate(timeout=30)
    assert code == 0, output + rest
    assert second.returncode == 0, rest
    assert list(losses(tmp_path / "r")) == [1, 2, 3]
    assert json.loads((tmp_path / "r" / "run.json").read_text())["world_size"] == 4


def test_a_sweep_runs_fresh_jobs_and_ends_with_a_table(tiny_job, tmp_path):
    words = [w for w in tiny_job if not w.startswith("trainer.lr")]
    words = [*PYTHON, "-m", "+mode=colocate", *words, "trainer.lr=1e-4,3e-3", "trainer.max_steps=3"]
    code, output, _ = run(words, 150, cwd=tmp_path)
    assert code == 0, output[-4000:]
    (table,) = tmp_path.glob("outputs/*/*/sweep.json")
    rows = json.loads(table.read_text())
    assert {row["settings"] for row in rows} == {"trainer.lr=0.0001", "trainer.lr=0.003"}
    assert all(row["objective"] > 0 for row in rows)
    assert len(list(table.parent.glob("[01]/result.json"))) == 2


def test_a_failing_job_does_not_end_the_sweep_but_its_exit_code(tiny_job, tmp_path):
    words = [w for w in tiny_job if not w.startswith("trainer.lr=")]
    words = [*PYTHON, "-m", "+mode=colocate", *words, "trainer.min_lr=2,0", "trainer.max_steps=2"]
    code, output, _ = run(words, 100, cwd=tmp_path)
    assert code != 0
    assert "trainer.min_lr=2.0 is above" in output
    (table,) = tmp_path.glob("outputs/*/*/sweep.json")
    assert sorted(row["objective"] is None for row in json.loads(table.read_text())) == [
        False,
        True,
    ]


@pytest.mark.parametrize("flag", ["-m", "--multirun", "+sweep=lr"])
def test_a_sweep_inside_torchrun_stops_with_the_right_command(flag):
    output = job(2, flag, "+mode=colocate", "trainer.lr=1e-4,3e-4", expect="error", timeout_s=60)
    right = "python -m colospec.run -m"
    assert output.count(right) == 2, "said, and summed up by torchrun"
    assert "trainer.lr=1e-4,3e-4" in output


SLOW_FIRST_RANK = """
import os, time
if os.environ.get("LOCAL_RANK") == "0":
    time.sleep(5)
"""


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trainer.lr=-1", "error: trainer.lr=-1"),
        ("trainer.rl=1", "error: there is no setting trainer.rl; did you mean trainer.lr"),
        ("-m", "error: a sweep cannot run inside torchrun"),
    ],
)
def test_an_error_of_the_settings_is_said_however_late_the_first_rank_is(tmp_path, word, says):
    (tmp_path / "sitecustomize.py").write_text(SLOW_FIRST_RANK)
    began = time.monotonic()
    output = job(3, "+mode=alternate", word, expect="error", env={"PYTHONPATH": str(tmp_path)})
    assert output.count(says) == 1, output
    assert time.monotonic() - began < 5 + PATIENCE_S / 2


SWALLOWING_IMPORT = """
import os, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and "RANK" in os.environ:
            sys.meta_path.remove(self)
            sys.stderr.write("importing\\n")
            try:
                time.sleep(20)
            except KeyboardInterrupt:
                if os.environ["RANK"] == "1":
                    raise
sys.meta_path.insert(0, Finder())
"""


def test_an_interrupt_ends_a_rank_whose_imports_would_swallow_it(tiny_job, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SWALLOWING_IMPORT)
    words = command(2, "-m", "colospec.run", "+mode=colocate", *tiny_job, f"run_dir={tmp_path}/r")
    with started(words, env={"PYTHONPATH": str(tmp_path)}) as process:
        for _ in range(2):
            read_until(process, "importing", 60)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert time.monotonic() - began < 10


def test_dry_run_shows_ranks_memory_and_steps_without_gpus(tiny_job, tmp_path):
    words = [*PYTHON, "+mode=colocate", *tiny_job, "launch.gpus=4", "dry_run=true"]
    words += ["data.held_out_samples=5", "trainer.eval_interval=7", "trainer.probe_interval=9"]
    code, output, _ = run(words, 60, cwd=tmp_path)
    assert code == 0, output
    assert "8 ranks" in output
    assert "cuda:3" in output
    assert re.search(r"steps: \d+ of 4 trainers", output)
    assert "ring: 3 slots x 512 tokens" in output
    measured = r"5 samples held out,\s+evaluated every 7 steps.*every 9 steps on 4 prompts x 32"
    assert re.search(measured, output, re.S)
    assert not (tmp_path / "outputs").exists(), "it only looks"


@pytest.mark.parametrize("to", [os.killpg, os.kill], ids=["ctrl_c", "one process"])
def test_an_interrupt_of_the_launcher_saves_and_leaves_no_rank(tiny_job, tmp_path, to):
    words = [*PYTHON, "+mode=colocate", *tiny_job, "trainer.max_steps=5000",
             f"run_dir={tmp_path}/r"]  # fmt: skip
    with started(words, cwd=tmp_path) as process:
        read_until(process, "step     3", 60)
        for _ in range(4):  # of somebody impatient
            to(process.pid, signal.SIGINT)
            time.sleep(0.1)
        output, _ = process.communicate(timeout=40)
        time.sleep(0.2)
        assert not pids_of(process)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "checkpoint saved" in output, output
    assert "KeyboardInterrupt" not in output
    assert re.search(r"still saving; `kill -9 \d+` ends the job at once", output), output
