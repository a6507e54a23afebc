"""The doctor's lines: what is right, and what is wrong with what to type."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from colospec.doctor import check, gpu, host
from colospec.doctor.__main__ import checks, main
from colospec.doctor.check import Check, run

PATH = os.environ["PATH"]


@pytest.fixture(autouse=True)
def _asked_anew():
    gpu.has_gpu.cache_clear()
    yield
    gpu.has_gpu.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """A machine without NVIDIA's programs."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Make up the GPUs of a machine, as rows of nvidia-smi."""

    def install(*rows, capability="9.0"):
        script = tmp_path / "nvidia-smi"
        listed = "\n".join(rows)
        script.write_text(
            f"#!/bin/sh\ncase $1 in *driver_version*) echo 580.1;; *compute_cap*) "
            f"echo {capability};; *) cat <<'END'\n{listed}\nEND\nesac\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{PATH}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


@pytest.mark.usefixtures("no_gpu")
def test_a_machine_without_gpu_is_healthy(capsys, tmp_path):
    assert main([f"--run-dir={tmp_path}", f"--cache-dir={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks(tmp_path, None))
    assert sum("no GPU: CPU runs work" in line for line in lines) == 5
    assert {line.split()[0] for line in lines} <= {"ok", "note"}


def test_command_line_fails_with_one_line_for_what_is_wrong(smi, monkeypatch):
    smi("0, GPU-1, 143771, NVIDIA H200")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    done = subprocess.run(
        [sys.executable, "-m", "colospec.doctor"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "'5' is not one of" in line]
    assert lines
    for line in lines:
        assert line.startswith("FAIL")
        assert "; fix: " in line


def test_gpus_are_counted_and_named(smi):
    size = random.randrange(10, 200)
    smi(*[f"{i}, GPU-{i}, {1024 * size}, NVIDIA H200" for i in range(3)])
    assert str(gpu.graphics_cards()) == (
        f"ok    GPUs: driver 580.1, 3x NVIDIA H200, {size} GiB each"
    )
    smi("0, GPU-0, 1024, NVIDIA H200", "1, GPU-1, 1024, NVIDIA L4")
    assert gpu.graphics_cards().status == "note"


@pytest.mark.parametrize(("capability", "good"), [("9.0", True), ("10.0", True), ("8.9", False)])
def test_old_gpus_are_sent_to_the_engine_that_serves_them(smi, capability, good):
    smi("0, GPU-0, 1024, NVIDIA L4", capability=capability)
    line = gpu.capability()
    assert (line.status == "ok") == good
    assert good or line.fix == "engine=hf"


def test_an_mps_that_is_missing_is_a_failure_with_a_fix(smi):
    smi("0, GPU-0, 1024, NVIDIA H200")
    line = gpu.mps()
    assert line.status == "FAIL"
    assert "not on PATH" in line.text
    assert "+mode=alternate" in line.fix


def test_a_cpu_build_of_torch_beside_a_gpu_is_a_failure(smi, monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    smi("0, GPU-0, 1024, NVIDIA H200")
    assert "CPU build" in gpu.torch_uses_gpus().text


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    subprocess.run(["sleep", "100"], check=False)


def fail_oddly():
    raise KeyError("a bug")


@pytest.mark.parametrize(
    ("look", "words"),
    [(crash, "ended with code -9"), (hang, "no result within 0.5 s"), (fail_oddly, "KeyError")],
)
def test_a_check_that_crashes_or_hangs_is_one_line_and_disturbs_nothing(look, words):
    began = time.monotonic()
    line = run(Check("odd", look, limit_s=0.5 if look is hang else 20))
    assert line.status == "FAIL"
    assert words in line.text
    assert time.monotonic() - began < 5
    assert run(Check("even", host.processes)) == check.ok(host.processes().text)


def test_disk_is_that_of_the_nearest_directory_that_exists(tmp_path):
    line = host.disk(tmp_path / "not" / "yet" / "there", "run_dir")
    assert line.text.endswith(str(tmp_path)) or str(tmp_path) in line.text
    assert "GiB free" in line.text


def test_a_full_disk_names_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_MIN_DISK", 2**70)
    line = host.disk(tmp_path, "data.cache_dir")
    assert (line.status, line.fix) == ("FAIL", "data.cache_dir=PATH on a larger disk")
