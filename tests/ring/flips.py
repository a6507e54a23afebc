"""Damage every byte of a control block, then use the ring: an error or no effect, never worse.

    python -m tests.ring.flips     # prints counts of outcomes as JSON

Run as a process of its own, so that a crash is seen. "unharmed" means that exactly the slots and
the text that were written came out; anything else that is not an error ends with an assertion.
"""

import collections
import json
import time

from colospec import _ring
from tests.ring.block import describe, make_block, open_both, open_reader

NUM_SLOTS, NUM_PUBLISHED, TEXT = 3, 2, b"engine failed"
PATTERNS = (0x01, 0x80, 0xFF)
ERRORS = {_ring.CORRUPT: "corrupt", _ring.AGAIN: "timeout"}
DEADLINE_S = 0.0005


def read(memory):
    """Drain as a trainer would; return what happened."""
    try:
        reader = open_reader(memory, NUM_SLOTS)
    except ValueError:
        return "refused"
    for index in range(NUM_PUBLISHED):
        status, *detail = reader.wait(DEADLINE_S)
        if status in ERRORS:
            return ERRORS[status]
        assert (status, *detail) == (_ring.READY, index % NUM_SLOTS, describe(index))
        if reader.release(1) == _ring.CORRUPT:
            return "corrupt"
    status, _, text = reader.wait(DEADLINE_S)
    if status in ERRORS:
        return ERRORS[status]
    assert (status, text) == (_ring.ERROR, TEXT)
    return "unharmed"


def write(memory, writer, pristine, position, pattern):
    """Go on as an engine whose trainer has closed in the meantime."""
    memory[:] = pristine
    memory[position] ^= pattern
    status = writer.wait(DEADLINE_S)[0]
    if status in ERRORS:
        return ERRORS[status]
    assert status == _ring.CLOSED
    return "unharmed"


def main():
    memory = make_block(NUM_SLOTS)
    writer, reader = open_both(memory, NUM_SLOTS)
    for index in range(NUM_PUBLISHED):
        writer.publish(describe(index))
    writer.leave(_ring.ERROR, TEXT)
    before_close = bytes(memory)
    for _ in range(NUM_PUBLISHED):
        reader.wait(0)
        reader.release(1)
    reader.leave(_ring.CLOSED, b"")
    after_close = bytes(memory)

    outcomes = {"read": collections.Counter(), "write": collections.Counter()}
    harmed = set()
    damaged = make_block(NUM_SLOTS)
    slowest_s = 0.0
    for position in range(len(memory)):
        for pattern in PATTERNS:
            damaged[:] = before_close
            damaged[position] ^= pattern
            began = time.monotonic()
            outcome = read(damaged)
            slowest_s = max(slowest_s, time.monotonic() - began)
            outcomes["read"][outcome] += 1
            if outcome != "unharmed":
                harmed.add(position)
            outcomes["write"][write(memory, writer, after_close, position, pattern)] += 1
    result = {"bytes": len(memory), "harmed": len(harmed), **outcomes, "slowest_s": slowest_s}
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
