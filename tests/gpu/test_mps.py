"""CUDA MPS with a real daemon: proof of clients, the gate of matrix products, and killed owners."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from colospec.mps import directory, gpus, start
from colospec.mps.client import NO_PIPE
from colospec.mps.control import PIPE_VARIABLE, Control
from colospec.mps.errors import MpsError
from tests.gpu import machine

pytestmark = [pytest.mark.gpu, machine.needs_gpus(1), pytest.mark.timeout(300)]

CLIENT = """
import sys, torch
torch.ones(1, device="cuda")
print("ready", flush=True)
sys.stdin.read()
"""
GATE = """
import json, time, torch
from colospec.mps.products import check_products
device = torch.device("cuda", 0)
torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
began = time.monotonic()
try:
    check_products(device, [(8192, 4096, 6144), (8192, 4096, 24576), (8192, 4096, 32000)])
    error = None
except RuntimeError as wrong:
    error = str(wrong)
facts = torch.cuda.get_device_properties(device)
print(json.dumps({"error": error, "s": time.monotonic() - began,
                  "sms": facts.multi_processor_count}))
"""


@pytest.fixture
def uuids():
    return gpus.uuid_list(gpus.visible())


@contextlib.contextmanager
def owned(uuids):
    """A daemon and the process that it lives with."""
    with subprocess.Popen(["sleep", "600"]) as owner:
        try:
            yield owner, start.start_keeper(owner.pid, gpus=uuids)
        finally:
            owner.kill()


@pytest.fixture
def daemon(uuids):
    with owned(uuids) as (_, started):
        yield started


def environment(pipe, uuids, **more):
    return {**os.environ, PIPE_VARIABLE: str(pipe), gpus.VISIBLE_VARIABLE: uuids, **more}


@contextlib.contextmanager
def client(pipe, uuids):
    """A process that has used CUDA and waits."""
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(pipe, uuids),
    ) as process:  # fmt: skip
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def seconds_until(condition, limit_s):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


def gate(daemon, uuids, percent):
    """Run the gate in a client that is capped at `percent` of the SMs."""
    done = subprocess.run(
        [sys.executable, "-c", GATE],
        capture_output=True, text=True, timeout=200, check=True,
        env=environment(daemon.pipe, uuids, CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=str(percent)),
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_a_client_is_listed_and_one_with_a_wrong_pipe_is_caught(daemon, uuids):
    start.probe(daemon.pipe, uuids)
    control = Control(daemon.pipe)
    with client(daemon.pipe, uuids) as inside, client(NO_PIPE, uuids) as outside:
        start.require_client(control, inside.pid)
        assert inside.pid in control.clients()
        with pytest.raises(MpsError, match=f"process {outside.pid} runs CUDA without MPS"):
            start.require_client(control, outside.pid, patience_s=1)


def test_gpus_keep_their_order_under_the_daemon(daemon, uuids):
    code = "import torch; print([str(torch.cuda.get_device_properties(i).uuid) for i in range("
    code += "torch.cuda.device_count())])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=100, check=True,
        env=environment(daemon.pipe, uuids),
    )  # fmt: skip
    assert done.stdout.strip() == str([u.removeprefix("GPU-") for u in uuids.split(",")])


def test_products_are_right_on_all_sms_within_two_seconds(daemon, uuids):
    found = gate(daemon, uuids, 100)
    assert found["error"] is None
    assert found["s"] < 2.0


@pytest.mark.parametrize("percent", [42, 60, 70])
def test_shares_of_the_sms_that_are_known_to_be_wrong_are_refused(daemon, uuids, percent):
    facts = torch.cuda.get_device_properties(0)
    if "H200" not in facts.name or facts.multi_processor_count != 132:
        pytest.skip(f"needs an H200 with 132 SMs, where the wrong shares are known; {facts.name}")
    if not torch.__version__.startswith("2.11.0+cu130"):
        pytest.skip(f"the wrong shares are those of torch 2.11.0+cu130; {torch.__version__}")
    found = gate(daemon, uuids, percent)
    assert found["sms"] < 132
    assert "mps.trainer_threads=null" in found["error"]
    assert f"{found['sms']} SMs" in found["error"]


def test_daemon_and_server_go_with_a_killed_owner_and_a_new_one_works_at_once(uuids):
    with owned(uuids) as (owner, started), client(started.pipe, uuids) as running:
        servers = Control(started.pipe).servers()
        assert servers
        start.require_client(Control(started.pipe), running.pid)
        owner.kill()
        pids = [started.daemon, *servers]
        took = seconds_until(lambda: not any(map(is_alive, pids)), 10)
        seconds_until(lambda: not started.pipe.exists(), 5)
        with owned(uuids) as (_, fresh):
            start.probe(fresh.pipe, uuids)
    assert took < 5.0


def test_daemon_goes_with_a_killed_keeper_and_the_next_start_sweeps(uuids):
    with owned(uuids) as (_, started), client(started.pipe, uuids):
        pids = [started.daemon, *Control(started.pipe).servers()]
        started.keeper.kill()
        assert seconds_until(lambda: not any(map(is_alive, pids)), 10) < 5.0
        with owned(uuids) as (_, fresh):
            assert not started.pipe.parent.exists()
            start.probe(fresh.pipe, uuids)
            assert fresh.pipe.parent in directory.live(directory.ROOT)


def test_memory_above_the_limit_of_a_client_is_refused(daemon, uuids):
    code = "import torch; torch.empty(2**31, dtype=torch.uint8, device='cuda')"
    limits = [("0=1G", "out of memory"), ("0=8G", "")]
    for limit, words in limits:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, timeout=100, check=False,
            env=environment(daemon.pipe, uuids, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=limit),
        )  # fmt: skip
        assert (done.returncode != 0) == bool(words), done.stderr
        assert words in done.stderr


def test_doctor_finds_mps_and_ipc_right():
    from colospec.doctor import gpu

    assert gpu.mps().status == "ok"
    assert gpu.ipc().status == "ok"
