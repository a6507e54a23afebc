"""Signals as a wish to stop, in a process whose main thread does not come back from C."""

import signal
import subprocess
import sys

import pytest

BLOCKED = """
import os, signal, sys, threading, time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from colospec.signals import StopSignals

number = int(sys.argv[1])
signals = StopSignals()
store = dist.TCPStore("127.0.0.1", 0, is_master=True)
handled = []
signal.signal(signal.SIGUSR1, lambda *_: handled.append(time.monotonic()))

def tell():
    time.sleep(0.3)
    print("before", signals.seen())
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), number)
    time.sleep(0.2)
    print("blocked", not handled, signals.seen(), flush=True)

thread = threading.Thread(target=tell)
thread.start()
with suppress(dist.DistStoreError):
    store.wait(["never"], timedelta(seconds=2))
thread.join()
print("after", bool(handled), signals.seen())
signals.close()
os.kill(os.getpid(), number)
print("closed")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda one: one.name)
def test_a_signal_is_seen_while_the_main_thread_waits_in_c(number):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(int(number))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "before None", f"blocked True {number.name}", f"after True {number.name}", "closed",
    ]  # fmt: skip
