"""What every FeatureSink and FeatureSource pair must do, whatever carries the features.

A backend subclasses `Conformance` and says how to open a pair; all calls come from one thread, so
that channels of one process qualify too.
"""

import random
import threading
import time

import pytest
import torch

from colospec.batch import FeatureSpec
from colospec.ring import Closed, PeerFailed, RingTimeout
from tests.ring.samples import SPEC, assert_same, fill, random_features, random_tokens

SHORT_S = 0.05


def eventually(look, expected):
    """What `look` gives once it is `expected`, or after a moment: counters may follow a stream."""
    deadline = time.monotonic() + SHORT_S
    while look() != expected and time.monotonic() < deadline:
        time.sleep(0.001)
    return look()


class Conformance:
    def open(self, spec, **options):
        """Return (sink, source); options: max_tokens, max_sequences, num_slots, lease, poison."""
        raise NotImplementedError

    @pytest.fixture
    def pair(self):
        """A function that opens a pair, which is closed after the test."""
        opened = []

        def open_pair(spec=SPEC, **changes):
            options = {"max_tokens": 32, "max_sequences": 32, "num_slots": 3}
            opened.append(self.open(spec, **(options | changes)))
            return opened[-1]

        yield open_pair
        for sink, source in opened:
            source.close()
            sink.close()

    def send(self, sink, index, spec=SPEC, num_tokens=None):
        tokens = random_tokens(
            index, num_tokens=random.randint(0, 32) if num_tokens is None else num_tokens
        )
        features = random_features(spec, tokens.num_tokens)
        fill(sink.acquire(tokens, timeout_s=SHORT_S), features)
        sink.publish()
        return tokens, features

    def receive(self, source, tokens, features):
        with source.acquire(timeout_s=SHORT_S) as lease:
            assert lease.cursor == tokens.cursor
            assert lease.digest == tokens.digest
            assert_same(lease.features, features)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("last", [True, False])
    def test_features_arrive_bit_for_bit(self, pair, dtype, last):
        spec = FeatureSpec((0, 2), last_hidden_states=last, hidden_size=7, dtype=dtype)
        sink, source = pair(spec)
        for index, num_tokens in enumerate([0, 1, 31, 32, 17]):
            self.receive(source, *self.send(sink, index, spec, num_tokens))

    @pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
    @pytest.mark.parametrize("lease", ["view", "copy"])
    def test_slots_come_in_order_whatever_the_fill(self, pair, num_slots, lease):
        sink, source = pair(num_slots=num_slots, lease=lease)
        sent = []
        for index in range(60):
            while sent and (len(sent) == num_slots or random.random() < 0.4):
                self.receive(source, *sent.pop(0))
            sent.append(self.send(sink, index))
        sink.end()
        for each in sent:
            self.receive(source, *each)
        assert source.acquire(timeout_s=SHORT_S) is None
        assert source.acquire(timeout_s=SHORT_S) is None

    def test_end_without_any_slot_is_none(self, pair):
        sink, source = pair()
        sink.end()
        assert source.acquire(timeout_s=SHORT_S) is None

    def test_failure_is_raised_with_its_text_after_the_slots_before_it(self, pair):
        sink, source = pair()
        sent = [self.send(sink, index) for index in range(3)]
        sink.fail("engine rank 5: CUDA out of memory \N{GREEK SMALL LETTER MU}")
        sink.fail("a second failure is not the cause")
        for each in sent:
            self.receive(source, *each)
        with pytest.raises(PeerFailed, match="out of memory \N{GREEK SMALL LETTER MU}"):
            source.acquire(timeout_s=SHORT_S)

    def test_slot_acquired_but_not_published_before_a_failure_is_not_delivered(self, pair):
        sink, source = pair()
        sent = self.send(sink, 0)
        sink.acquire(random_tokens(1, num_tokens=4), timeout_s=SHORT_S)
        sink.fail("kernel crashed")
        self.receive(source, *sent)
        with pytest.raises(PeerFailed, match="kernel crashed"):
            source.acquire(timeout_s=SHORT_S)

    def test_close_without_end_is_a_failure(self, pair):
        sink, source = pair()
        sent = self.send(sink, 0)
        # A ring's `close` waits for the source.
        closing = threading.Thread(target=sink.close)
        closing.start()
        self.receive(source, *sent)
        while source.stats().engine.phase not in ("failed", "closed"):
            time.sleep(0.001)
        with pytest.raises(PeerFailed, match="before the end"):
            source.acquire(timeout_s=SHORT_S)
        source.close()
        closing.join(10)
        assert not closing.is_alive()

    def test_acquire_raises_closed_after_the_source_has_closed(self, pair):
        sink, source = pair()
        self.send(sink, 0)
        source.close()
        with pytest.raises(Closed):
            sink.acquire(random_tokens(1, num_tokens=4), timeout_s=SHORT_S)
        with pytest.raises(Closed):
            source.acquire(timeout_s=SHORT_S)

    def test_acquire_after_own_close_raises_closed(self, pair):
        sink, source = pair()
        source.close()
        sink.close()
        with pytest.raises(Closed):
            sink.acquire(random_tokens(0, num_tokens=4), timeout_s=SHORT_S)

    def test_close_is_idempotent(self, pair):
        sink, source = pair()
        for _ in range(2):
            source.close()
        for _ in range(2):
            sink.close()

    def test_full_channel_times_out_until_a_lease_is_released(self, pair):
        sink, source = pair(num_slots=2)
        self.send(sink, 0)
        self.send(sink, 1)
        lease = source.acquire(timeout_s=SHORT_S)
        with pytest.raises(RingTimeout, match=r"published 2, released 0, 2 slots.*trainer using"):
            sink.acquire(random_tokens(2, num_tokens=4), timeout_s=SHORT_S)
        lease.release()
        self.send(sink, 2)

    def test_empty_channel_times_out(self, pair):
        _, source = pair()
        with pytest.raises(RingTimeout, match="published 0"):
            source.acquire(timeout_s=SHORT_S)

    def test_features_of_a_released_lease_cannot_be_read(self, pair):
        sink, source = pair()
        self.send(sink, 0)
        with source.acquire(timeout_s=SHORT_S) as lease:
            assert lease.features is not None
        with pytest.raises(RuntimeError, match="released"):
            _ = lease.features
        lease.release()
        self.send(sink, 1)

    def test_lease_is_released_when_its_block_raises(self, pair):
        sink, source = pair(num_slots=1)
        self.send(sink, 0)
        with pytest.raises(ZeroDivisionError), source.acquire(timeout_s=SHORT_S):
            _ = 1 / 0
        self.send(sink, 1)

    def test_leases_released_out_of_order_free_slots_in_order(self, pair):
        sink, source = pair(num_slots=3)
        sent = [self.send(sink, index) for index in range(3)]
        leases = [source.acquire(timeout_s=SHORT_S) for _ in range(3)]
        leases[1].release()
        with pytest.raises(RingTimeout):
            sink.acquire(random_tokens(3, num_tokens=4), timeout_s=SHORT_S)
        assert_same(leases[0].features, sent[0][1])
        leases[0].release()
        sent += [self.send(sink, index) for index in (3, 4)]
        assert_same(leases[2].features, sent[2][1])
        leases[2].release()
        for each in sent[3:]:
            self.receive(source, *each)

    def test_view_of_a_released_lease_is_poisoned_and_a_copy_is_not(self, pair):
        for lease, is_poisoned in (("view", True), ("copy", False)):
            sink, source = pair(lease=lease, poison=True)
            _, features = self.send(sink, 0, num_tokens=32)
            with source.acquire(timeout_s=SHORT_S) as held:
                kept = held.features
                assert_same(kept, features)
            if is_poisoned:
                assert kept.aux_hidden_states.isnan().all()
                assert kept.last_hidden_states.isnan().all()
            else:
                assert_same(kept, features)

    def test_views_outlive_both_sides(self, pair):
        sink, source = pair()
        _, features = self.send(sink, 0)
        kept = source.acquire(timeout_s=SHORT_S).features
        source.close()
        sink.close()
        assert_same(kept, features)

    def test_views_are_aligned_for_kernels(self, pair):
        sink, _ = pair()
        views = sink.acquire(random_tokens(0, num_tokens=3), timeout_s=SHORT_S)
        starts = [t.data_ptr() for t in (views.aux_hidden_states, views.last_hidden_states)]
        assert (starts[1] - starts[0]) % 256 == 0
        assert all(start % 64 == 0 for start in starts)

    def test_micro_batch_that_fits_no_slot_names_the_setting(self, pair):
        sink, _ = pair(max_tokens=16, max_sequences=4)
        with pytest.raises(ValueError, match=r"17 tokens.*data\.token_budget=17"):
            sink.acquire(random_tokens(0, num_tokens=17, max_length=17), timeout_s=SHORT_S)
        with pytest.raises(ValueError, match=r"5 sequences.*data\.max_sequences=5"):
            sink.acquire(random_tokens(0, num_tokens=5, max_length=1), timeout_s=SHORT_S)

    def test_acquire_and_publish_must_alternate(self, pair):
        sink, _ = pair()
        with pytest.raises(RuntimeError, match="publish without acquire"):
            sink.publish()
        sink.acquire(random_tokens(0, num_tokens=3), timeout_s=SHORT_S)
        with pytest.raises(RuntimeError, match="not yet published"):
            sink.acquire(random_tokens(1, num_tokens=3), timeout_s=SHORT_S)

    def test_publish_after_a_failure_is_refused_and_not_delivered(self, pair):
        sink, source = pair()
        sink.acquire(random_tokens(0, num_tokens=3), timeout_s=SHORT_S)
        sink.fail("kernel crashed")
        with pytest.raises(RuntimeError, match="after fail"):
            sink.publish()
        with pytest.raises(PeerFailed, match="kernel crashed"):
            source.acquire(timeout_s=SHORT_S)

    def test_end_with_an_unpublished_slot_is_refused(self, pair):
        sink, _ = pair()
        sink.acquire(random_tokens(0, num_tokens=3), timeout_s=SHORT_S)
        with pytest.raises(RuntimeError, match="not yet published"):
            sink.end()

    def test_failure_after_close_does_not_hide_the_error_that_led_to_it(self, pair):
        sink, source = pair()
        source.close()
        sink.close()
        sink.fail("too late to matter")
        with pytest.raises(Closed):
            sink.end()

    def test_acquire_after_end_is_refused(self, pair):
        sink, _ = pair()
        sink.end()
        with pytest.raises(RuntimeError, match="after end"):
            sink.acquire(random_tokens(0, num_tokens=3), timeout_s=SHORT_S)

    def test_stats_count_the_slots_that_are_full(self, pair):
        sink, source = pair()
        assert source.fill == 0
        self.send(sink, 0)
        self.send(sink, 1)
        with source.acquire(timeout_s=SHORT_S):
            assert eventually(lambda: source.fill, 2) == 2
        assert eventually(lambda: source.fill, 1) == 1
        assert sink.stats().filled == 1
