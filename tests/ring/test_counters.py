"""The C ring against a deque: any order of calls, any start of the counters."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from colospec import _ring
from tests.ring.block import MAX_TOKENS, describe, geometry, make_block, open_both

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
        status, slot = self.writer.acquire(0)
        if self.is_closed:
            assert status == _ring.CLOSED
        elif len(self.full) + len(self.leased) == self.num_slots:
            assert (status, slot) == (_ring.AGAIN, None)
        else:
            assert (status, slot) == (_ring.READY, self.sent % self.num_slots)
            assert self.writer.publish(*describe(self.sent)) == _ring.READY
            self.full.append(self.sent)
            self.sent += 1

    @precondition(lambda self: not self.is_closed)
    @rule()
    def take(self):
        status, detail = self.reader.acquire(0)
        if self.full:
            index = self.full.popleft()
            assert (status, detail) == (
                _ring.READY,
                (index % self.num_slots, *describe(index)),
            )
            self.leased.append(index)
        elif self.record is None:
            assert status == _ring.AGAIN
        else:
            kind, text = self.record
            assert status == (_ring.END if kind == _ring.RECORD_END else _ring.ERROR)
            assert detail == (None if kind == _ring.RECORD_END else text)

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
            self.reader.release(len(self.leased) + 1)

    @precondition(lambda self: self.record is None)
    @rule(is_end=st.booleans(), text=st.text(max_size=40))
    def finish(self, is_end, text):
        kind = _ring.RECORD_END if is_end else _ring.RECORD_ERROR
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
        self.reader.leave(_ring.RECORD_CLOSE, b"")
        self.is_closed = True

    @rule()
    def look_for_close(self):
        expected = _ring.CLOSED if self.is_closed else _ring.AGAIN
        assert self.writer.wait_closed(0) == expected

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
        assert writer.acquire(0) == (_ring.READY, index % 3)
        writer.publish(*describe(index))
        assert reader.acquire(0) == (_ring.READY, (index % 3, *describe(index)))
        assert reader.release(1) == _ring.READY


def test_publish_beyond_the_free_slots_is_refused():
    writer, _ = open_both(make_block(1), 1)
    writer.publish(*describe(0))
    with pytest.raises(ValueError, match="no free slot"):
        writer.publish(*describe(1))


def test_each_side_refuses_the_calls_of_the_other():
    writer, reader = open_both(make_block(2), 2)
    for call in (
        lambda: reader.publish(*describe(0)),
        lambda: writer.release(0),
        lambda: reader.leave(_ring.RECORD_END, b""),
        lambda: writer.leave(_ring.RECORD_CLOSE, b""),
        lambda: writer.leave(0, b""),
        lambda: writer.leave(_ring.RECORD_ERROR, bytes(_ring.TEXT_BYTES + 1)),
        lambda: reader.wait_closed(0),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            call()


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf"), 1e300])
def test_timeout_that_is_no_duration_is_refused(timeout):
    writer, _ = open_both(make_block(1), 1)
    for wait in (writer.acquire, writer.wait_closed):
        with pytest.raises(ValueError, match="timeout_s"):
            wait(timeout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 0}, "number of slots"),
        ({0: 5}, "size of the control block|number of slots|magic"),
        ({1: 1}, "tensor table"),
        ({2: 1 << 62}, "tensor table"),
        ({5: ()}, "number of tensors"),
        ({5: (("x", 1, 4, 0, 0),)}, "tensor table"),
        ({5: (("x", 1, 4, 1, 8),)}, "tensor table"),
        ({5: (("x", 1, 4, 1, 1 << 40),)}, "tensor table"),
        ({5: (("x" * 40, 1, 4, 1, 0),)}, "longer than 31"),
        ({5: tuple((str(i), 1, 4, 1, 0) for i in range(9))}, "at most 8"),
    ],
)
def test_geometry_that_cannot_work_is_refused(change, message):
    fields = list(geometry(3))
    for index, value in change.items():
        fields[index] = value
    with pytest.raises(ValueError, match=message):
        _ring.Ring(make_block(3), tuple(fields))


def test_reader_refuses_memory_that_is_no_ring():
    for memory, reason in (
        (bytearray(0), "size"),
        (bytearray(100), "size"),
        (make_block(2), "magic"),
        (memoryview(make_block(3))[8:], "alignment"),
    ):
        with pytest.raises(ValueError, match=f"damaged or foreign: {reason}"):
            _ring.Ring(memory)


@pytest.mark.parametrize("num_slots", [0, 1025, -1])
def test_number_of_slots_out_of_range_is_refused(num_slots):
    with pytest.raises((ValueError, OverflowError)):
        _ring.control_bytes(num_slots)


def test_most_tokens_fit():
    writer, reader = open_both(make_block(1), 1)
    writer.publish(0, 0, 0, 0, MAX_TOKENS, MAX_TOKENS)
    assert reader.acquire(0)[1][-2:] == (MAX_TOKENS, MAX_TOKENS)
    with pytest.raises(ValueError, match="no free slot for 17"):
        writer.publish(0, 0, 0, 0, MAX_TOKENS + 1, 1)


def test_cuda_driver_is_loaded_or_the_reason_says_what_to_do():
    reason = _ring.cuda_driver_error()
    assert reason is None or "colospec.doctor" in reason or "update it" in reason
