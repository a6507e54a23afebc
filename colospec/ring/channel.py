"""The ring between two processes of one host: `Writer` for the engine, `Reader` for its trainer.

Both constructors meet in the job's store and return only once both sides have agreed and share the
memory. The engine owns it: K slots of features and one control block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from dataclasses import replace
from typing import Literal

from colospec import _ring
from colospec.batch import Features, FeatureSpec, TokenBatch
from colospec.ring.errors import Corrupt, RingState, shorten
from colospec.ring.handshake import (
    Offer,
    Store,
    compare,
    key,
    raise_refusal,
    raise_stale,
    receive,
)
from colospec.ring.lease import LeaseBook, SlotLease
from colospec.ring.link import Link
from colospec.ring.memory import Process, SharedFile, boot_id, map_foreign
from colospec.ring.spec import Agreement, Note, SlotLayout, check_size, control_bytes

log = logging.getLogger(__name__)


class Writer:
    """The engine's side: implements `batch.FeatureSink`.

    Raises SpecMismatch if the trainer was started with other settings, PeerFailed if it could not
    attach, and RingTimeout if it did not come within `timeout_s`, which also bounds `close`.
    `acquire` and `publish` can raise Closed, PeerDied, Corrupt and RingTimeout (see colospec.ring).
    """

    def __init__(
        self,
        store: Store,
        pair: str,
        spec: FeatureSpec,
        *,
        max_tokens: int,
        max_sequences: int,
        num_slots: int,
        plan_digest: str,
        timeout_s: float,
        gpu_uuid: str | None = None,
    ) -> None:
        self._limits = (max_tokens, max_sequences)
        self._timeout_s = timeout_s
        self._filling: TokenBatch | None = None
        self._has_ended = False
        layout = SlotLayout.plan(spec, max_tokens)
        ring_id = secrets.token_hex(8)
        agreement = Agreement.of(
            spec, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
            plan_digest=plan_digest, gpu_uuid=gpu_uuid, boot_id=boot_id(),
        )  # fmt: skip
        # Attached or not, the files are closed: mappings do not need them. The control block goes
        # first (see _attach).
        with (
            SharedFile("colospec-payload", num_slots * layout.slot_bytes) as payload,
            SharedFile("colospec-control", control_bytes(num_slots)) as control,
        ):
            label = layout.label(max_sequences, ring_id)
            ring = _ring.Ring(control.map(), True, num_slots, 0, label)
            slots = layout.slots(payload.map(), num_slots)
            offer = Offer(Process.current(), agreement, ring_id, control.fd, payload.fd)
            try:
                pidfd = _meet(store, pair, offer, timeout_s)
            except BaseException as error:
                # For a trainer that attaches in this very moment.
                text = f"the engine gave up at the handshake: {type(error).__name__}: {error}"
                ring.leave(_ring.ERROR, shorten(text, _ring.TEXT_BYTES))
                raise
        self._link = Link(ring, slots, pair=pair, peer="trainer", pidfd=pidfd)

    def acquire(self, tokens: TokenBatch, *, timeout_s: float) -> Features:
        """Wait for a free slot; return its views [T, width], to be filled before `publish`."""
        self._link.require_open()
        if self._filling is not None:
            raise RuntimeError(
                f"acquire of {tokens.cursor}: {self._filling.cursor} is not yet published"
            )
        if self._has_ended:
            raise RuntimeError(f"acquire of {tokens.cursor} after end or fail")
        check_size(tokens, *self._limits)
        taken = self._link.acquire(timeout_s)
        assert taken is not None, "END is the engine's own word"
        self._filling = tokens
        return self._link.slots[taken[0]].features(tokens.num_tokens)

    def publish(self) -> None:
        """Hand the acquired slot over; its views must not be touched again."""
        if self._filling is None:
            raise RuntimeError("publish without acquire")
        tokens, self._filling = self._filling, None
        if self._has_ended:
            raise RuntimeError(f"publish of {tokens.cursor} after fail")
        self._link.require(self._link.ring.publish(Note.of(tokens).to_bytes()))

    def end(self) -> None:
        """Say that no micro-batch follows those published. Without effect after `fail`."""
        self._link.require_open()
        if self._filling is not None and not self._has_ended:
            raise RuntimeError(f"end: {self._filling.cursor} is not yet published")
        self._leave(_ring.END, b"")

    def fail(self, error: str) -> None:
        """Leave `error` to the trainer, which raises it after the slots published before.

        Without effect after `end`, `close` or an earlier `fail`. A text of more than about 4 kB
        keeps its beginning and its end.
        """
        self._leave(_ring.ERROR, shorten(error, _ring.TEXT_BYTES))

    def close(self) -> None:
        """Let go of the memory once the trainer has let go or is dead. Idempotent.

        A ring closed without `end` or `fail` is an error for the trainer. A trainer that does not
        close within `timeout_s` costs a warning.
        """
        if not self._link.is_open:
            return
        self._leave(_ring.ERROR, b"the engine closed the ring before the end of its work")
        try:
            status, _, detail = self._link.wait(self._timeout_s)
            if status == _ring.CORRUPT:
                log.warning("%s", self._link.corrupt(detail.decode()))
            elif status == _ring.AGAIN:
                log.warning(
                    "the trainer did not let go of the ring within %g s [%s]",
                    self._timeout_s, self._link.state(),
                )  # fmt: skip
        finally:
            self._link.close()

    def stats(self) -> RingState:
        """Look at both sides: slots filled, phases, seconds waited for the other side."""
        return self._link.state()

    def _leave(self, kind: int, text: bytes) -> None:
        if not self._has_ended:
            self._link.ring.leave(kind, text)
            self._has_ended = True


class Reader:
    """The trainer's side: implements `batch.FeatureSource`.

    `lease` "view" hands out tensors that lie in the slot; "copy" clones them and frees the slot at
    once. Several leases may be held, and released in any order; the engine gets slots back in
    theirs. `poison` fills released slots with NaN, to find readers of released leases. Raises as
    `Writer` does, and PeerDied if the engine is gone already.
    """

    def __init__(
        self,
        store: Store,
        pair: str,
        spec: FeatureSpec,
        *,
        max_tokens: int,
        max_sequences: int,
        num_slots: int,
        plan_digest: str,
        timeout_s: float,
        lease: Literal["view", "copy"] = "view",
        poison: bool = False,
        gpu_uuid: str | None = None,
    ) -> None:
        self._limits = (max_tokens, max_sequences)
        self._book = LeaseBook(copies=lease == "copy", poison=poison, release=self._release)
        layout = SlotLayout.plan(spec, max_tokens)
        agreement = Agreement.of(
            spec, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
            plan_digest=plan_digest, gpu_uuid=gpu_uuid, boot_id=boot_id(),
        )  # fmt: skip
        reply, link = Offer(Process.current(), agreement), None
        try:
            offer = receive(store, pair, "engine", timeout_s=timeout_s)
            reply = replace(reply, ring_id=offer.ring_id)
            compare(pair, engine=offer.agreement, trainer=agreement)
            link = _attach(offer, pair, layout, num_slots, max_sequences)
            store.set(key(pair, "trainer"), reply.to_bytes())
        except BaseException as error:
            if link is not None:
                link.close()
            # Also a refusal is answered, so that the engine need not wait for its deadline.
            refusal = replace(reply, error=f"{type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                store.set(key(pair, "trainer"), refusal.to_bytes())
            raise
        self._link = link

    def acquire(self, *, timeout_s: float) -> SlotLease | None:
        """Wait for the oldest full slot; None after the engine's `end`."""
        taken = self._link.acquire(timeout_s, self._book.num_held)
        if taken is None:
            return None
        slot, note = self._link.slots[taken[0]], Note.from_bytes(taken[1])
        if note.num_tokens > self._limits[0] or note.num_sequences > self._limits[1]:
            raise self._link.corrupt("number of tokens or sequences in a slot header")
        return self._book.lease(note.cursor, note.digest, slot, note.num_tokens)

    def close(self) -> None:
        """Tell the engine to stop, release all leases, and let go of the memory. Idempotent."""
        if not self._link.is_open:
            return
        try:
            self._book.release_all()
        finally:
            self._link.ring.leave(_ring.CLOSED, b"")
            self._link.close()

    def stats(self) -> RingState:
        """Look at both sides: slots filled, phases, seconds waited for the other side."""
        return self._link.state()

    @property
    def fill(self) -> int:
        """Slots published and not yet released, those under lease among them."""
        return self.stats().filled

    def _release(self, count: int) -> None:
        self._link.require(self._link.ring.release(count))


def _meet(store: Store, pair: str, offer: Offer, timeout_s: float) -> int:
    """Offer the ring; return the pidfd of the trainer that has attached."""
    store.set(key(pair, "engine"), offer.to_bytes())
    reply = receive(store, pair, "trainer", timeout_s=timeout_s)
    raise_stale(pair, offer, reply)
    compare(pair, engine=offer.agreement, trainer=reply.agreement)
    raise_refusal(pair, reply)
    return reply.process.watch()


def _attach(
    offer: Offer, pair: str, layout: SlotLayout, num_slots: int, max_sequences: int
) -> Link:
    pidfd = offer.process.watch()
    try:
        # The control block comes last: its engine withdraws it first, and it holds the ring's id,
        # so that while it is there both file descriptors still mean what the offer says.
        payload = map_foreign(offer.process, pidfd, offer.payload_fd, num_slots * layout.slot_bytes)
        control = map_foreign(offer.process, pidfd, offer.control_fd, control_bytes(num_slots))
        label = layout.label(max_sequences, offer.ring_id)
        try:
            ring = _ring.Ring(control, False, num_slots, 0, label)
        except ValueError as error:
            raise Corrupt(str(error)) from None
        return Link(ring, layout.slots(payload, num_slots), pair=pair, peer="engine", pidfd=pidfd)
    except BaseException:
        os.close(pidfd)
        raise
