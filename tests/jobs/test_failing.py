"""Whatever dies, the job ends soon, says who and why, and leaves nothing behind."""

import json
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.jobs.start import files, job, rank_pid, wait_for
from tests.torchrun import command, pids_of, run, started

LONG = ["trainer.max_steps=5000", "trainer.save_interval=1"]


def shared_memory():
    return {p.name for p in Path("/dev/shm").iterdir() if "colospec" in p.name}


@pytest.mark.parametrize(
    ("role", "phase"),
    [
        ("trainer", "phase load"),
        ("engine", "phase load"),
        ("trainer", "phase attach"),
        ("engine", "phase attach"),
        ("trainer", "phase train"),
        ("engine", "phase capture"),
    ],
)
def test_a_killed_rank_ends_the_job_in_five_seconds(tiny_job, tmp_path, role, phase):
    run_dir = tmp_path / "run"
    before = shared_memory()
    rank = 0 if role == "trainer" else 1
    words = command(2, "-m", "colospec.run", "+mode=colocate", *tiny_job, *LONG,
                    f"run_dir={run_dir}")  # fmt: skip
    with started(words) as process:
        wait_for(run_dir / "log" / f"rank{rank}.log", phase, process)
        time.sleep(0.3 if phase in ("phase train", "phase capture") else 0)
        os.kill(rank_pid(process, rank), signal.SIGKILL)
        began = time.monotonic()
        output, _ = process.communicate(timeout=30)
        took = time.monotonic() - began
        assert not pids_of(process)
    assert process.returncode != 0
    assert took < 5, output
    ending = "\n".join(output.splitlines()[-45:])
    assert re.search(rf"rank {rank} \({role} 0 on cpu\)|SIGKILL", ending), output
    assert shared_memory() == before
    assert not [name for name in files(run_dir) if ".tmp" in name]


def test_the_last_words_of_torchrun_are_the_root_cause_and_where_its_traceback_is(
    tiny_job, tmp_path
):
    words = command(2, "-m", "colospec.run", "+mode=colocate", *tiny_job, f"run_dir={tmp_path}/r",
                    "data.path=/nowhere.jsonl")  # fmt: skip
    code, output, _ = run(words, 60)
    assert code == 1
    says = "ValueError: data.path=/nowhere.jsonl does not exist"
    assert output.count("Traceback") == 1, "torchrun's own"
    ending = "\n".join(output.splitlines()[-4:])
    assert says in ending, output
    assert f"(tracebacks: {tmp_path}/r/log)" in ending
    logged = "".join(file.read_text() for file in (tmp_path / "r" / "log").iterdir())
    assert "Traceback" in logged
    assert says in logged


@pytest.mark.slow
@pytest.mark.parametrize("role", ["trainer", "engine"])
def test_a_rank_killed_in_a_probe_ends_the_job_in_five_seconds(tiny_job, tmp_path, role):
    run_dir = tmp_path / "run"
    before = shared_memory()
    rank = 0 if role == "trainer" else 1
    measures = ["data.held_out_samples=8", "trainer.probe_interval=2", "trainer.probe_tokens=60"]
    words = command(2, "-m", "colospec.run", "+mode=colocate", *tiny_job, *LONG, *measures,
                    f"run_dir={run_dir}")  # fmt: skip
    with started(words) as process:
        wait_for(run_dir / "log" / "rank0.log", "phase probe", process)
        exported = run_dir / "probe" / "step-000002"
        deadline = time.monotonic() + 30
        while not exported.is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(rank_pid(process, rank), signal.SIGKILL)
        began = time.monotonic()
        output, _ = process.communicate(timeout=30)
        took = time.monotonic() - began
        assert not pids_of(process)
    assert process.returncode != 0
    assert took < 5, output
    ending = "\n".join(output.splitlines()[-45:])
    assert re.search(rf"rank {rank} \({role} 0 on cpu\)|SIGKILL", ending), output
    assert "probe/real_acceptance_length" not in (run_dir / "metrics.jsonl").read_text(), (
        "it was over"
    )
    assert shared_memory() == before


@pytest.mark.parametrize("victim", ["torchrun", pytest.param("ranks", marks=pytest.mark.slow)])
def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(tiny_job, tmp_path, victim):
    run_dir = tmp_path / "run"
    words = [*tiny_job, f"run_dir={run_dir}"]
    start = command(2, "-m", "colospec.run", "+mode=colocate", *words, "trainer.max_steps=5000")
    with started(start) as process:
        wait_for(run_dir / "metrics.jsonl", '"step": 3,', process)
        began = time.monotonic()
        if victim == "torchrun":
            os.kill(process.pid, signal.SIGTERM)
        else:
            os.kill(rank_pid(process, 1), signal.SIGTERM)
        output, _ = process.communicate(timeout=40)
        took = time.monotonic() - began
    assert took < 25, output
    assert "checkpoint saved; go on with run_dir=" in output
    steps = [p.name for p in (run_dir / "checkpoint").iterdir()]
    assert len(steps) == 1
    done = int(steps[0].removeprefix("step-"))
    output = job(2, "+mode=colocate", *words, f"trainer.max_steps={done + 2}")
    assert f"{done} steps done" in output
    assert (run_dir / "export" / "model.safetensors").is_file()


def test_a_stopped_engine_is_named_when_the_limit_passes(tiny_job, tmp_path):
    run_dir = tmp_path / "run"
    words = command(2, "-m", "colospec.run", "+mode=colocate", *tiny_job, *LONG,
                    "limit.step_s=4", f"run_dir={run_dir}")  # fmt: skip
    with started(words) as process:
        wait_for(run_dir / "metrics.jsonl", '"step": 2,', process)
        engine = rank_pid(process, 1)
        os.kill(engine, signal.SIGSTOP)
        time.sleep(9)
        os.kill(engine, signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"(engine|rank 1).*(capture|4 s|4\.0 s)", output), output


def test_missing_data_is_one_error_and_no_traceback_on_the_console(tiny_job, tmp_path):
    words = [word for word in tiny_job if not word.startswith("data.path")]
    missing = tmp_path / "nothing.jsonl"
    output = job(2, "+mode=colocate", *words, f"data.path={missing}",
                 f"run_dir={tmp_path}/run", expect="error")  # fmt: skip
    assert str(missing) in output
    assert output.count("error: rank") == 1


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tiny_job, tmp_path):
    run_dir = tmp_path / "run"
    words = [*tiny_job, f"run_dir={run_dir}", "trainer.save_interval=2"]
    job(2, "+mode=colocate", *words, "trainer.max_steps=6")
    newest = run_dir / "checkpoint" / "step-000006"
    shard = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0x10
    shard.write_bytes(content)
    output = job(2, "+mode=colocate", *words, "trainer.max_steps=8")
    assert "warning" in output
    assert shard.name in output
    assert "4 steps done" in output


def test_a_full_disk_while_saving_names_the_path_and_keeps_the_last_checkpoint(tiny_job, tmp_path):
    run_dir = tmp_path / "run"
    words = [*tiny_job, f"run_dir={run_dir}"]
    job(2, "+mode=colocate", *words, "trainer.max_steps=2")
    good = files(run_dir / "checkpoint")
    start = command(2, "-m", "colospec.run", "+mode=colocate", *words, "trainer.max_steps=60")
    with started(start) as process:
        wait_for(run_dir / "metrics.jsonl", '"step": 4,', process)
        resource.prlimit(rank_pid(process, 0), resource.RLIMIT_FSIZE, (300_000, 300_000))
        output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert str(run_dir / "checkpoint") in output
    assert "free" in output
    assert files(run_dir / "checkpoint") == good
    result = json.loads((run_dir / "result.json").read_text())
    assert result["steps"] == 2
