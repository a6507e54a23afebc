"""A ring as its C face sees it: control blocks in memory, without torch, for quick processes."""

import mmap
import struct

from colospec import _ring

SLOT_BYTES = 1024
LABEL = b"0123456789abcdef 16/16 1024 features:float32[4]@0"


def describe(index):
    """The note that every test writes for micro-batch `index`."""
    digest = index * 0x9E3779B97F4A7C15 % (1 << 64)
    return struct.pack("=6Q", index // 7, index, index // 2, digest, index % 17, index % 5)


def block_bytes(num_slots):
    """The size of a control block."""
    return _ring.CONTROL_BYTES + num_slots * _ring.HEADER_BYTES


def make_block(num_slots):
    """Zeroed memory for a control block, aligned as a ring wants it."""
    return mmap.mmap(-1, block_bytes(num_slots))


def open_writer(memory, num_slots, start_seq=0):
    """Format zeroed memory as a control block."""
    return _ring.Ring(memory, True, num_slots, start_seq, LABEL)


def open_reader(memory, num_slots, start_seq=0):
    """Attach to a formatted control block."""
    return _ring.Ring(memory, False, num_slots, start_seq, LABEL)


def open_both(memory, num_slots, start_seq=0):
    """Return (writer, reader) over one zeroed control block."""
    return open_writer(memory, num_slots, start_seq), open_reader(memory, num_slots, start_seq)
