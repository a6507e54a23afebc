"""Damaged shared memory: an error or no effect, never a crash, a hang or a wrong slot."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from colospec import _ring
from colospec.ring import Corrupt
from colospec.ring.link import Link
from tests.ring.block import describe, make_block, open_both, open_reader

ROOT = Path(__file__).parents[2]
GEOMETRY_BYTES, PUBLISHED, RELEASED, HEADER_BYTES = 512, 512, 4864, 64
FIRST_HEADER = _ring.CONTROL_BYTES


def test_every_damaged_byte_is_an_error_or_harmless():
    done = subprocess.run(
        [sys.executable, "-m", "tests.ring.flips"],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # The geometry and both slot headers have no byte that can change unnoticed.
    assert result["read"]["refused"] >= 3 * GEOMETRY_BYTES
    assert result["read"]["corrupt"] >= 3 * 2 * HEADER_BYTES
    assert result["write"]["corrupt"] >= 3 * 16
    assert result["slowest_s"] < 1.0


def test_random_damage_of_many_bytes_is_an_error_or_harmless():
    for _ in range(500):
        read_after_random_damage()


def read_after_random_damage():
    memory = make_block(3)
    writer, _ = open_both(memory, 3)
    for index in range(3):
        writer.publish(describe(index))
    position = random.randrange(GEOMETRY_BYTES, len(memory))
    damage = random.randbytes(random.randint(1, 200))
    memory[position : position + len(damage)] = damage[: len(memory) - position]
    try:
        reader = open_reader(memory, 3)
    except ValueError:
        return
    for index in range(4):
        status, *detail = reader.wait(0.001, index)
        if status != _ring.READY:
            assert status in (_ring.CORRUPT, _ring.AGAIN)
            return
        assert detail == [index, describe(index)]


@pytest.mark.parametrize("word", [PUBLISHED, RELEASED])
@pytest.mark.parametrize("value", [0, 1, 5, 1 << 40, (1 << 64) - 1])
def test_counters_that_cannot_be_are_found_by_the_peer_or_their_owner(word, value):
    memory = make_block(3)
    writer, reader = open_both(memory, 3)
    for index in range(2):
        assert writer.wait(0)[0] == _ring.READY
        writer.publish(describe(index))
        assert reader.wait(0)[0] == _ring.READY
        assert reader.release(1) == _ring.READY
    assert writer.wait(0)[0] == _ring.READY
    writer.publish(describe(2))
    assert reader.wait(0)[0] == _ring.READY
    memory[word : word + 8] = value.to_bytes(8, "little")
    if word == PUBLISHED:
        found = [reader.wait(0)[0], writer.publish(describe(3))]
    else:
        found = [writer.wait(0)[0], reader.release(1)]
    assert _ring.CORRUPT in found


def test_corrupt_error_names_the_field_and_the_state():
    memory = make_block(3)
    writer, reader = open_both(memory, 3)
    writer.publish(describe(0))
    memory[FIRST_HEADER] ^= 1
    link = Link(reader, [], pair="7", peer="engine", pidfd=os.pidfd_open(os.getpid()))
    with pytest.raises(Corrupt, match=r"slot header.*ring 7: published 1, released 0"):
        link.acquire(1.0)
    link.close()
