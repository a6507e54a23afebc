"""A ring as its C face sees it: control blocks in memory, without torch, for quick processes."""

import mmap

from colospec import _ring

MAX_TOKENS, WIDTH, SLOT_BYTES = 16, 4, 1024
TABLE = (("features", 1, 4, WIDTH, 0), ("last", 3, 2, 2, 256))


def geometry(num_slots, start_seq=0):
    """What `_ring.Ring` takes; both tensors fit SLOT_BYTES."""
    return (num_slots, SLOT_BYTES, MAX_TOKENS, MAX_TOKENS, start_seq, TABLE)


def describe(index):
    """The header that every test writes for micro-batch `index`."""
    return (index // 7, index, index // 2, index * 0x9E3779B97F4A7C15 % (1 << 64), index % 17,
            index % 5)  # fmt: skip


def make_block(num_slots):
    """Zeroed memory for a control block, aligned as a ring wants it."""
    return mmap.mmap(-1, _ring.control_bytes(num_slots))


def open_both(memory, num_slots, start_seq=0):
    """Return (writer, reader) over one zeroed control block."""
    return _ring.Ring(memory, geometry(num_slots, start_seq)), _ring.Ring(memory)
