"""The ring between two processes of one host: `Writer` for the engine, `Reader` for its trainer.

Both constructors meet in the job's store and return only once both sides have agreed and share the
memory. The engine owns it: K slots of features and one control block.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from colospec import _ring
from colospec.batch import Features, FeatureSpec, TokenBatch
from colospec.ring.attach import Payload, Terms, join_ring, keep, offer_ring
from colospec.ring.errors import RingState, shorten
from colospec.ring.handshake import Store
from colospec.ring.lease import LeaseBook, SlotLease
from colospec.ring.spec import Note, check_size

CPU = torch.device("cpu")
log = logging.getLogger(__name__)


class Writer:
    """The engine's side: implements `batch.FeatureSink`.

    On a CUDA `device` the slots lie in its memory (`payload` "ipc"), or in pinned host memory
    ("host"; "auto" where CUDA IPC does not work); `publish` follows the current stream's work and
    never waits for it.

    Raises SpecMismatch if the trainer was started with other settings, PeerFailed if it could not
    attach, RingTimeout if it did not come within `timeout_s`, which also bounds `close`, and
    MemoryError if the slots do not fit into the GPU.
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
        device: torch.device = CPU,
        payload: Payload = "auto",
    ) -> None:
        self._limits = (max_tokens, max_sequences)
        self._timeout_s = timeout_s
        self._device = device
        self._filling: TokenBatch | None = None
        self._has_ended = False
        terms = Terms.of(
            spec, device, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
            plan_digest=plan_digest,
        )  # fmt: skip
        self._link = offer_ring(store, pair, terms, payload, timeout_s)

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
        self._link.publish(Note.of(tokens).to_bytes())

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
        close within `timeout_s` costs a warning, and keeps the memory.
        """
        if not self._link.is_open:
            return
        self._leave(_ring.ERROR, b"the engine closed the ring before the end of its work")
        status = _ring.AGAIN
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
            if self._device.type == "cuda" and status not in (_ring.CLOSED, _ring.DEAD):
                keep(self._link.slots)
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
    once. Several leases may be held, and released in any order (on a GPU all in one stream); the
    engine gets slots back in theirs. `poison` fills released slots with NaN, to find readers of
    released leases. Slots in pinned host memory are always copied out: reading them again and again
    over PCIe would be slower. Raises as `Writer` does, and PeerDied if the engine is gone already.
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
        device: torch.device = CPU,
        payload: Payload = "auto",
    ) -> None:
        self._limits = (max_tokens, max_sequences)
        terms = Terms.of(
            spec, device, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
            plan_digest=plan_digest,
        )  # fmt: skip
        self._link, uses_ipc = join_ring(store, pair, terms, payload, timeout_s)
        copies = lease == "copy" or (device.type == "cuda" and not uses_ipc)
        self._book = LeaseBook(copies=copies, poison=poison, release=self._link.release)

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
        self._link.require_open()
        try:
            self._book.release_all()
            # Before the engine may free what is mapped here.
            self._link.detach()
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
