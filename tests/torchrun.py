"""Run real torchrun jobs in tests, and see that nothing is left of them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(num_ranks, *words, node=None, num_nodes=1, port=None):
    rendezvous = ["--standalone"]
    if num_nodes > 1:
        rendezvous = [
            f"--nnodes={num_nodes}",
            f"--node-rank={node}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
        ]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, *rendezvous, f"--nproc-per-node={num_ranks}", *map(str, words)]


@contextmanager
def started(words, env=None, **options):
    """Start a command in a session of its own; kill all that is left of it at the end.

    A mark in the environment finds its processes: torchrun gives every rank a session of its own.
    """
    mark = f"COLOSPEC_TEST_JOB={uuid.uuid4()}"
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**ENV, **(env or {}), **dict([mark.split("=")])},
        **options,
    )
    process.mark = mark.encode()
    try:
        yield process
    finally:
        for pid in pids_of(process):
            os.kill(pid, signal.SIGKILL)
        process.wait(10)
        process.stdout.close()


def pids_of(process):
    """All live processes that descend from one that `started` began, in order of their pids."""
    pids = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            marked = process.mark in environ.read_bytes().split(b"\0")
        except OSError:
            continue
        if marked:  # a zombie's environment is empty
            pids.append(int(environ.parent.name))
    return sorted(pids)


def run(words, timeout_s, **options):
    """Run to the end; return (code, output, seconds). Fails if a process is left behind."""
    began = time.monotonic()
    with started(words, **options) as process:
        output, _ = process.communicate(timeout=timeout_s)
        took = time.monotonic() - began
        deadline = time.monotonic() + 3
        while pids_of(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not pids_of(process), "processes left behind"
    return process.returncode, output, took


def read_until(process, pattern, timeout_s):
    """Read the output up to the line that matches; return all of it."""
    lines = []
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if not line:
            break
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"never saw {pattern!r} in:\n{''.join(lines)}")
