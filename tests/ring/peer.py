"""One side of a ring as a small process without torch, for tests that kill it.

    python peer.py engine NUM_SLOTS FAIL_AFTER     # prints its offer, publishes until it is killed
    python peer.py trainer ENGINE_PID CONTROL_FD PAYLOAD_FD     # reads until it is killed

Each slot holds its index in every word. Both print a line of JSON when their peer is gone.
"""

import json
import mmap
import os
import sys
import time

from colospec import _ring
from tests.ring.block import SLOT_BYTES, block_bytes, describe, open_reader, open_writer

PATIENCE_S = 20.0


def stamp(index):
    return (index * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(8, "little") * (SLOT_BYTES // 8)


def report(**facts):
    print(json.dumps(facts), flush=True)  # noqa: T201


def be_engine(num_slots, fail_after):
    files = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("control", "payload")]
    sizes = (block_bytes(num_slots), num_slots * SLOT_BYTES)
    for fd, nbytes in zip(files, sizes, strict=True):
        os.ftruncate(fd, nbytes)
    control, payload = (mmap.mmap(fd, size) for fd, size in zip(files, sizes, strict=True))
    ring = open_writer(control, num_slots)
    report(pid=os.getpid(), files=files, num_slots=num_slots)
    pidfd = os.pidfd_open(int(sys.stdin.readline()))
    index = 0
    while index != fail_after:
        status, slot, _ = ring.wait(PATIENCE_S, 0, pidfd)
        if status != _ring.READY:
            return report(side="engine", status=status, count=index, at=time.monotonic())
        payload[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = stamp(index)
        ring.publish(describe(index))
        index += 1
    ring.leave(_ring.ERROR, f"failed on purpose after {index}".encode())
    status = ring.wait(PATIENCE_S, 0, pidfd)[0]
    return report(side="engine", status=status, at=time.monotonic())


def be_trainer(pid, files, num_slots):
    sizes = (block_bytes(num_slots), num_slots * SLOT_BYTES)
    opened = [os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR) for fd in files]
    control, payload = (mmap.mmap(fd, size) for fd, size in zip(opened, sizes, strict=True))
    ring = open_reader(control, num_slots)
    pidfd = os.pidfd_open(pid)
    report(pid=os.getpid())
    index, wrong = 0, 0
    while True:
        status, slot, detail = ring.wait(PATIENCE_S, 0, pidfd)
        if status != _ring.READY:
            break
        found = payload[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        wrong += (detail, found) != (describe(index), stamp(index))
        index += 1
        ring.release(1)
    published = ring.state()[0]
    report(
        side="trainer", status=status, count=index, lost=published - index, wrong=wrong,
        at=time.monotonic(), text=detail.decode(),
    )  # fmt: skip
    ring.leave(_ring.CLOSED, b"")


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[2:]]
    if sys.argv[1] == "engine":
        be_engine(*numbers)
    else:
        be_trainer(numbers[0], numbers[1:3], numbers[3])
