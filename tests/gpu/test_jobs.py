"""Whole colocated jobs on a GPU: MPS, GPU ring, SGLang, FSDP2; killed, resumed, compared."""

import json
import math
import os
import re
import sys
import time

import pytest
import torch

from tests import tiny
from tests.gpu import machine
from tests.jobs.start import job, losses, wait_for
from tests.jobs.test_dflash import of_dflash
from tests.jobs.test_resume import kill_after, weights
from tests.torchrun import PROGRAMS, command, pids_of, run

pytestmark = [pytest.mark.gpu, machine.needs_gpus(1), pytest.mark.timeout(400)]

STEPS = 24
TIMEOUT_S = 200
REPEATABLE = ["trainer.deterministic=true"]


@pytest.fixture(scope="module")
def gpu_job(tmp_path_factory):
    """A small bfloat16 target whose head size the fast kernels know, and few rows."""
    root = tmp_path_factory.mktemp("gpu-job")
    target = tiny.write_target(
        root / "target", hidden_size=256, num_layers=6, head_dim=64, num_key_value_heads=2
    )
    data = tiny.write_data(root / "train.jsonl", num_rows=80)
    return [
        *tiny.overrides(root, target, data),
        "target.dtype=bfloat16",
        "trainer.epochs=9",
        "trainer.save_interval=4",
        f"trainer.max_steps={STEPS}",
    ]


@pytest.fixture(scope="module")
def whole(gpu_job, tmp_path_factory):
    """A run that nobody disturbed; no process of it is left, its MPS daemon neither."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    output = job(2, "+mode=colocate", *gpu_job, *REPEATABLE, f"run_dir={run_dir}",
                 timeout_s=TIMEOUT_S)  # fmt: skip
    assert "MPS" in output
    return run_dir


def same(run_dir, whole):
    assert losses(run_dir) == losses(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(run_dir)[name]), name


def test_a_colocated_run_ends_with_finite_losses_and_an_export(whole):
    values = losses(whole)
    assert len(values) == STEPS
    assert all(map(math.isfinite, values.values()))
    assert (whole / "export" / "model.safetensors").is_file()


def test_the_same_seed_gives_the_same_losses_and_weights(whole, gpu_job, tmp_path):
    run_dir = tmp_path / "again"
    job(2, "+mode=colocate", *gpu_job, *REPEATABLE, f"run_dir={run_dir}", timeout_s=TIMEOUT_S)
    same(run_dir, whole)


def test_a_run_killed_with_everything_goes_on_at_once_and_gives_the_same(whole, gpu_job, tmp_path):
    run_dir = tmp_path / "run"
    words = [*gpu_job, *REPEATABLE, f"run_dir={run_dir}"]
    code = kill_after(
        command(2, "-m", "colospec.run", "+mode=colocate", *words),
        lambda process: wait_for(run_dir / "metrics.jsonl", '"step": 9,', process, TIMEOUT_S),
        pids_of,
    )
    assert code != 0
    output = job(2, "+mode=colocate", *words, timeout_s=TIMEOUT_S)
    assert "resume:" in output
    same(run_dir, whole)


def test_a_killed_run_of_dflash_draws_its_anchors_anew_and_gives_the_same(gpu_job, tmp_path):
    words = [*of_dflash(gpu_job), *REPEATABLE]
    job(2, "+mode=colocate", *words, f"run_dir={tmp_path}/whole", timeout_s=TIMEOUT_S)
    words.append(f"run_dir={tmp_path}/run")
    kill_after(
        command(2, "-m", "colospec.run", "+mode=colocate", *words),
        lambda process: wait_for(tmp_path / "run/metrics.jsonl", '"step": 9,', process, TIMEOUT_S),
        pids_of,
    )
    output = job(2, "+mode=colocate", *words, timeout_s=TIMEOUT_S)
    assert "resume:" in output
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_killed_ends_the_job_with_its_name_and_leaves_nothing(gpu_job, tmp_path, victim):
    run_dir = tmp_path / "run"
    words = command(
        2, "-m", "colospec.run", "+mode=colocate", *gpu_job, "trainer.max_steps=100000",
        f"run_dir={run_dir}",
    )  # fmt: skip

    def pick(process):
        pids = dict(
            line.split("=")
            for pid in pids_of(process)
            if (line := rank_of(pid)) is not None
        )  # fmt: skip
        return [int(pids[str(victim)])]

    code = kill_after(
        words,
        lambda process: wait_for(run_dir / "metrics.jsonl", '"step": 5,', process, TIMEOUT_S),
        pick,
    )
    assert code != 0


def rank_of(pid):
    """RANK=PID of a torchrun worker that runs the job itself, or None."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:  # noqa: PTH123
            values = dict(
                item.split(b"=", 1) for item in environ.read().split(b"\0") if b"=" in item
            )
        with open(f"/proc/{pid}/cmdline", "rb") as words:  # noqa: PTH123
            is_rank = b"colospec.run" in words.read().split(b"\0")
    except OSError:
        return None
    return f"{values[b'RANK'].decode()}={pid}" if is_rank and b"RANK" in values else None


@pytest.mark.parametrize("engine", ["sglang", "hf"])
def test_alternate_mode_gives_the_losses_gradients_and_weights_of_colocate(
    gpu_job, tmp_path, engine
):
    found = {}
    for mode, ranks in (("colocate", 2), ("alternate", 1)):
        run_dir = tmp_path / mode
        words = [*gpu_job, *REPEATABLE, f"engine={engine}", f"run_dir={run_dir}"]
        job(ranks, f"+mode={mode}", *words, timeout_s=TIMEOUT_S)
        found[mode] = (losses(run_dir), losses(run_dir, "train/grad_norm"), weights(run_dir))
    assert found["colocate"][:2] == found["alternate"][:2]
    for name, weight in found["colocate"][2].items():
        assert torch.equal(weight, found["alternate"][2][name]), name


def test_sglang_and_transformers_give_nearly_the_same_losses(whole, gpu_job, tmp_path):
    run_dir = tmp_path / "hf"
    job(2, "+mode=colocate", *gpu_job, "engine=hf", f"run_dir={run_dir}", timeout_s=TIMEOUT_S)
    ours, theirs = losses(whole), losses(run_dir)
    for step, value in ours.items():
        assert value == pytest.approx(theirs[step], rel=0.02)


@pytest.mark.parametrize(
    "words",
    [["ring.payload=host"], ["ring.lease=copy"], ["mps=off"], ["engine.forward_tokens=300"]],
    ids=" ".join,
)
def test_losses_do_not_depend_on_how_features_travel(whole, gpu_job, tmp_path, words):
    run_dir = tmp_path / "run"
    job(2, "+mode=colocate", *gpu_job, *REPEATABLE, *words, f"run_dir={run_dir}",
        timeout_s=TIMEOUT_S)  # fmt: skip
    if "forward_tokens" in words[0]:  # other shapes choose other kernels
        assert losses(run_dir)[STEPS] == pytest.approx(losses(whole)[STEPS], rel=0.02)
    else:
        assert losses(run_dir) == losses(whole)


def test_the_trainer_sees_the_engines_features_bit_for_bit_over_300_steps(gpu_job, tmp_path):
    data = tiny.write_data(tmp_path / "many.jsonl", num_rows=2000)
    words = command(
        2, PROGRAMS / "checksum_run.py", "+mode=colocate", *gpu_job, "trainer.max_steps=300",
        f"data.path={data}",
        "trainer.save_interval=0", "trainer.epochs=99", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    code, output, _ = run(words, TIMEOUT_S, env={"CHECKSUMS": str(tmp_path)})
    assert code == 0, output[-4000:]
    trainer, engine = (
        json.loads((tmp_path / f"checksums-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert len(trainer) >= 300
    assert len(set(trainer.values())) == len(trainer)
    assert {cursor: engine[cursor] for cursor in trainer} == trainer


def test_each_job_of_a_sweep_has_a_daemon_of_its_own(gpu_job, tmp_path):
    words = [
        sys.executable, "-m", "colospec.run", "-m", "+mode=colocate", *gpu_job, "launch.gpus=1",
        "trainer.lr=1e-3,3e-3", f"run_dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    code, output, _ = run(words, 2 * TIMEOUT_S)
    assert code == 0, output[-4000:]
    logs = [tmp_path / "sweep" / number / "log" / "rank0.log" for number in ("0", "1")]
    daemons = [re.search(r"mps: daemon (\d+)", log.read_text())[1] for log in logs]
    assert daemons[0] != daemons[1]


def test_gpu_is_free_after_a_kill_of_everything(gpu_job, tmp_path):
    free, _ = torch.cuda.mem_get_info()
    run_dir = tmp_path / "run"
    kill_after(
        command(2, "-m", "colospec.run", "+mode=colocate", *gpu_job, f"run_dir={run_dir}"),
        lambda process: wait_for(run_dir / "metrics.jsonl", '"step": 3,', process, TIMEOUT_S),
        pids_of,
    )
    # The kernel lets go of a process's memory before it closes its GPU files.
    deadline = time.monotonic() + 5
    while torch.cuda.mem_get_info()[0] < free - 2**28 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert torch.cuda.mem_get_info()[0] >= free - 2**28
    assert not [p for p in os.listdir("/dev/shm") if p.startswith("colospec")]  # noqa: PTH208
