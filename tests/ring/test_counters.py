"""The C ring against a deque: any order of calls, any start of the counters."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from colospec import _ring
from colospec.ring.spec import control_bytes
from tests.ring.block import LABEL, describe, make_block, open_both, open_reader

STARTS = st.sampled_from([0, 1, (1 << 32) - 2, (1 << 63) - 2, (1 << 64) - 3]) | st.integers(
    0, (1 << 64) - 1
)


class RingAgainstDeque(RuleBasedStateMachine):
    @initialize(num_slots=st.integers(1, 5), start_seq=STARTS)
    def begin(self, num_slots, start_seq):
        self.num_slots = num_slots
        memory = make_block(num_slots)
        self.writer, self.reader = open_both(memory, num_slots, start_seq)
        self.full, self.leased = deque(), deque()
        self.sent = self.released = 0
        self.record = None
        self.is_closed = False

    @precondition(lambda self: self.record is None)
    @rule()
    def publish(self):
        status, slot, _ = self.writer.wait(0)
        if self.is_closed:
            assert status == _ring.CLOSED
        elif len(self.full) + len(self.leased) == self.num_slots:
            assert status == _ring.AGAIN
        else:
            assert (status, slot) == (_ring.READY, self.sent % self.num_slots)
            assert self.writer.publish(describe(self.sent)) == _ring.READY
            self.full.append(self.sent)
            self.sent += 1

    @precondition(lambda self: not self.is_closed)
    @rule()
    def take(self):
        status, slot, detail = self.reader.wait(0, len(self.leased))
        if self.full:
            index = self.full.popleft()
            assert (status, slot, detail) == (_ring.READY, index % self.num_slots, describe(index))
            self.leased.append(index)
        elif self.record is None:
            assert status == _ring.AGAIN
        else:
            kind, text = self.record
            assert (status, detail.decode()) == (kind, text)

    @precondition(lambda self: self.full and not self.is_closed)
    @rule()
    def take_and_be_interrupted(self):
        """A slot that the caller never got is handed out again by the next `take`."""
        assert self.reader.wait(0, len(self.leased))[0] == _ring.READY

    @precondition(lambda self: self.leased and not self.is_closed)
    @rule(data=st.data())
    def release(self, data):
        count = data.draw(st.integers(1, len(self.leased)))
        assert self.reader.release(count) == _ring.READY
        for _ in range(count):
            self.leased.popleft()
        self.released += count

    @precondition(lambda self: not self.is_closed)
    @rule()
    def release_too_many(self):
        with pytest.raises(ValueError, match="slots to release"):
            self.reader.release(len(self.leased) + len(self.full) + 1)

    @precondition(lambda self: self.record is None)
    @rule(is_end=st.booleans(), text=st.text(max_size=40))
    def finish(self, is_end, text):
        kind = _ring.END if is_end else _ring.ERROR
        text = text.encode(errors="replace").decode()
        self.writer.leave(kind, text.encode())
        self.record = (kind, text)

    @precondition(lambda self: not self.is_closed)
    @rule()
    def close(self):
        if self.leased:
            self.reader.release(len(self.leased))
            self.released += len(self.leased)
            self.leased.clear()
        self.reader.leave(_ring.CLOSED, b"")
        self.is_closed = True

    @precondition(lambda self: self.record is not None)
    @rule()
    def look_for_close(self):
        expected = _ring.CLOSED if self.is_closed else _ring.AGAIN
        assert self.writer.wait(0)[0] == expected

    @invariant()
    def counters_agree(self):
        published, released, _, _ = self.reader.state()
        assert (published, released) == (self.sent, self.released)


RingAgainstDeque.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestRingAgainstDeque = RingAgainstDeque.TestCase


@pytest.mark.parametrize("start_seq", [0, (1 << 32) - 5000, (1 << 63) - 5000, (1 << 64) - 5000])
def test_ten_thousand_slots_pass_in_order_over_the_wrap(start_seq):
    writer, reader = open_both(make_block(3), 3, start_seq)
    for index in range(10_000):
        assert writer.wait(0)[:2] == (_ring.READY, index % 3)
        writer.publish(describe(index))
        assert reader.wait(0) == (_ring.READY, index % 3, describe(index))
        assert reader.release(1) == _ring.READY


def test_publish_beyond_the_free_slots_is_refused():
    writer, _ = open_both(make_block(1), 1)
    writer.publish(describe(0))
    with pytest.raises(ValueError, match="no free slot"):
        writer.publish(describe(1))


def test_each_side_refuses_the_calls_of_the_other():
    writer, reader = open_both(make_block(2), 2)
    for call in (
        lambda: reader.publish(describe(0)),
        lambda: writer.release(0),
        lambda: reader.leave(_ring.END, b""),
        lambda: writer.leave(_ring.CLOSED, b""),
        lambda: writer.leave(_ring.READY, b""),
        lambda: writer.leave(_ring.ERROR, bytes(_ring.TEXT_BYTES + 1)),
        lambda: writer.publish(bytes(47)),
        lambda: reader.wait(0, 1),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            call()


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf"), 1e300])
def test_timeout_that_is_no_duration_is_refused(timeout):
    writer, _ = open_both(make_block(1), 1)
    with pytest.raises(ValueError, match="timeout_s"):
        writer.wait(timeout)


@pytest.mark.parametrize("num_slots", [0, 4, 1 << 57, (1 << 64) - 1])
def test_number_of_slots_that_the_memory_does_not_hold_is_refused(num_slots):
    with pytest.raises(ValueError, match="number of slots"):
        _ring.Ring(make_block(3), True, num_slots, 0, LABEL)


def test_label_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="489 bytes"):
        _ring.Ring(make_block(3), True, 3, 0, bytes(_ring.LABEL_BYTES + 1))


def test_reader_refuses_memory_that_is_no_ring():
    for memory, reason in (
        (bytearray(0), "number of slots, or size"),
        (bytearray(100), "number of slots, or size"),
        (make_block(2), "magic"),
        (memoryview(make_block(3))[8:], "alignment"),
    ):
        with pytest.raises(ValueError, match=f"damaged or foreign: {reason}"):
            open_reader(memory, 2)


@pytest.mark.parametrize(
    "expected", [(2, 0, LABEL), (3, 1, LABEL), (3, 0, LABEL.replace(b"0123", b"3210"))]
)
def test_reader_refuses_a_ring_of_another_geometry(expected):
    memory = make_block(3)
    open_both(memory, 3)
    with pytest.raises(ValueError, match="another ring, or other settings"):
        _ring.Ring(memory, False, *expected)


@pytest.mark.parametrize("num_slots", [0, 1025, -1])
def test_number_of_slots_out_of_range_is_refused(num_slots):
    with pytest.raises(ValueError, match=rf"ring\.num_slots={num_slots} must be in \[1, 1024\]"):
        control_bytes(num_slots)


def test_publish_and_release_after_the_last_word_are_refused():
    writer, reader = open_both(make_block(2), 2)
    writer.publish(describe(0))
    assert reader.wait(0)[0] == _ring.READY
    writer.leave(_ring.END, b"")
    reader.leave(_ring.CLOSED, b"")
    with pytest.raises(ValueError, match="no free slot"):
        writer.publish(describe(1))
    with pytest.raises(ValueError, match="slots to release"):
        reader.release(1)


def test_cuda_driver_is_loaded_or_the_reason_says_what_to_do():
    reason = _ring.cuda_driver_error()
    assert reason is None or "docker run --gpus all" in reason or "update it" in reason
