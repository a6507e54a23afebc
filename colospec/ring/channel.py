"""The ring between two processes of one host: `Writer` for the engine, `Reader` for its trainer.

Both constructors meet in the job's store and return only once both sides have agreed and share the
memory. The engine owns it: K slots of features and one control block.
"""

from __future__ import annotations

import logging
import os
from typing import Literal, TypeAlias, cast

from colospec import _ring
from colospec.batch import Cursor, Features, FeatureSpec, TokenBatch
from colospec.ring.errors import RingState, shorten
from colospec.ring.handshake import Offer, Store, compare, key, raise_refusal, receive
from colospec.ring.lease import LeaseBook, SlotLease
from colospec.ring.link import Link
from colospec.ring.memory import Process, SharedFile, boot_id, map_foreign
from colospec.ring.spec import Agreement, SlotLayout, check_size

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
        control = SharedFile("colospec-control", _ring.control_bytes(num_slots))
        payload = SharedFile("colospec-payload", num_slots * layout.slot_bytes)
        try:
            ring = _ring.Ring(
                control.map(),
                (num_slots, layout.slot_bytes, max_tokens, max_sequences, 0, layout.table()),
            )
            slots = layout.slots(payload.map(), num_slots)
            agreement = Agreement.of(
                spec, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
                plan_digest=plan_digest, gpu_uuid=gpu_uuid, boot_id=boot_id(),
            )  # fmt: skip
            offer = Offer(Process.current(), agreement, control.fd, payload.fd)
            store.set(key(pair, "engine"), offer.to_bytes())
            reply = receive(store, pair, "trainer", timeout_s=timeout_s)
            compare(pair, engine=agreement, trainer=reply.agreement)
            raise_refusal(pair, reply)
            pidfd = reply.process.watch()
        finally:
            # Attached or not: the mappings do not need the files any more.
            control.close()
            payload.close()
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
        _, slot = self._link.acquire(timeout_s)
        assert isinstance(slot, int)
        self._filling = tokens
        return self._link.slots[slot].features(tokens.num_tokens)

    def publish(self) -> None:
        """Hand the acquired slot over; its views must not be touched again."""
        if self._filling is None:
            raise RuntimeError("publish without acquire")
        tokens, self._filling = self._filling, None
        cursor = tokens.cursor
        self._link.require(
            self._link.ring.publish(
                cursor.epoch, cursor.micro_batch, cursor.step, tokens.digest,
                tokens.num_tokens, tokens.num_sequences,
            )
        )  # fmt: skip

    def end(self) -> None:
        """Say that no micro-batch follows those published."""
        self._leave(_ring.RECORD_END, b"")

    def fail(self, error: str) -> None:
        """Leave `error` to the trainer, which raises it after the slots published before.

        Without effect after `end` or an earlier `fail`. A text of more than about 4 kB keeps its
        beginning and its end.
        """
        self._leave(_ring.RECORD_ERROR, shorten(error, _ring.TEXT_BYTES))

    def close(self) -> None:
        """Let go of the memory once the trainer has let go or is dead. Idempotent.

        A ring closed without `end` or `fail` is an error for the trainer. A trainer that does not
        close within `timeout_s` costs a warning.
        """
        if not self._link.is_open:
            return
        self._leave(_ring.RECORD_ERROR, b"the engine closed the ring before the end of its work")
        status = self._link.ring.wait_closed(self._timeout_s)
        if status not in (_ring.CLOSED, _ring.DEAD):
            log.warning(
                "the trainer did not let go of the ring within %g s [%s]",
                self._timeout_s, self._link.state(),
            )  # fmt: skip
        self._link.close()

    def stats(self) -> RingState:
        """Look at both sides: slots filled, phases, seconds waited in `acquire`."""
        return self._link.state()

    def _leave(self, kind: int, text: bytes) -> None:
        ring = self._link.ring
        if not self._has_ended:
            self._has_ended = True
            ring.leave(kind, text)


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
        self._book = LeaseBook(copies=lease == "copy", poison=poison, release=self._release)
        layout = SlotLayout.plan(spec, max_tokens)
        agreement = Agreement.of(
            spec, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
            plan_digest=plan_digest, gpu_uuid=gpu_uuid, boot_id=boot_id(),
        )  # fmt: skip
        refusal: str | None = "interrupted"
        try:
            offer = receive(store, pair, "engine", timeout_s=timeout_s)
            compare(pair, engine=offer.agreement, trainer=agreement)
            self._link = _attach(offer, pair, layout, num_slots)
            refusal = None
        except Exception as error:
            refusal = f"{type(error).__name__}: {error}"
            raise
        finally:
            # Also a refusal is answered, so that the engine need not wait for its deadline.
            reply = Offer(Process.current(), agreement, error=refusal)
            store.set(key(pair, "trainer"), reply.to_bytes())

    def acquire(self, *, timeout_s: float) -> SlotLease | None:
        """Wait for the oldest full slot; None after the engine's `end`."""
        status, detail = self._link.acquire(timeout_s)
        if status == _ring.END:
            return None
        slot, epoch, micro_batch, step, digest, num_tokens, _ = cast(_Detail, detail)
        cursor = Cursor(epoch, micro_batch, step)
        return self._book.lease(cursor, digest, self._link.slots[slot], num_tokens)

    def close(self) -> None:
        """Tell the engine to stop, release all leases, and let go of the memory. Idempotent."""
        if not self._link.is_open:
            return
        try:
            self._book.release_all()
        finally:
            self._link.ring.leave(_ring.RECORD_CLOSE, b"")
            self._link.close()

    def stats(self) -> RingState:
        """Look at both sides: slots filled, phases, seconds waited in `acquire`."""
        return self._link.state()

    @property
    def fill(self) -> int:
        """Slots published and not yet released, those under lease among them."""
        return self.stats().filled

    def _release(self, count: int) -> None:
        self._link.require(self._link.ring.release(count))


# slot, epoch, micro_batch, step, digest, num_tokens, num_sequences
_Detail: TypeAlias = tuple[int, int, int, int, int, int, int]


def _attach(offer: Offer, pair: str, layout: SlotLayout, num_slots: int) -> Link:
    pidfd = offer.process.watch()
    try:
        control = map_foreign(offer.process, offer.control_fd, _ring.control_bytes(num_slots))
        payload = map_foreign(offer.process, offer.payload_fd, num_slots * layout.slot_bytes)
        ring = _ring.Ring(control)
        return Link(ring, layout.slots(payload, num_slots), pair=pair, peer="engine", pidfd=pidfd)
    except BaseException:
        os.close(pidfd)
        raise
