"""What one look of the watchdog makes of things that happen while it looks."""

import subprocess
import sys

PROGRAM = """
import os, signal, subprocess

import torch.distributed as dist

from colospec import log
from colospec.config import Mode
from colospec.store import ERROR_KEY, JobStore
from colospec.topology import build
from colospec.watchdog import Watchdog

log.to_console()
other = subprocess.Popen(["sleep", "60"])

class Store(JobStore):
    def peek(self, key):
        if key == ERROR_KEY and other.poll() is None:
            other.kill()
            other.wait()
            os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does
        return super().peek(key)

places = build(Mode.colocate, world_size=2, local_world_size=2, visible_gpus=0).places
store = Store(dist.HashStore())
store.set("pid/1", str(other.pid).encode())
watchdog = Watchdog(store, places[0], places)
watchdog.phase("load", 60)
for _ in range(3):
    watchdog.look()
print("still here")
"""


def test_a_death_behind_the_looks_back_is_not_taken_for_a_wish_to_stop():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 1 (engine 0 on cpu) died" in done.stdout + done.stderr
    assert "SIGTERM in phase" not in done.stdout + done.stderr
