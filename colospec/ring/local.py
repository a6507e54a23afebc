"""The ring's slots inside one process: engine and trainer in turn, in one thread.

The oracle for the shared-memory ring and the channel of mode=alternate: same order, same leases,
same errors. Where the ring would wait, this raises RingTimeout at once, since nobody else can act.
"""

from __future__ import annotations

import sys
import time
from typing import Literal

import torch

from colospec.batch import Cursor, Features, FeatureSpec, TokenBatch
from colospec.ring.errors import Closed, PeerFailed, RingState, RingTimeout, SideState
from colospec.ring.lease import LeaseBook, SlotLease
from colospec.ring.spec import Slot, SlotLayout, check_size


class LocalChannel:
    """Both ends of in-process slots: `writer` is a FeatureSink, `reader` a FeatureSource."""

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        max_tokens: int,
        max_sequences: int = sys.maxsize,
        num_slots: int = 1,
        lease: Literal["view", "copy"] = "view",
        poison: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        slots = _Slots(spec, max_tokens, max_sequences, num_slots, device)
        self.writer = LocalWriter(slots)
        self.reader = LocalReader(slots, copies=lease == "copy", poison=poison)


class _Slots:
    """The state that both ends share."""

    def __init__(
        self,
        spec: FeatureSpec,
        max_tokens: int,
        max_sequences: int,
        num_slots: int,
        device: torch.device | str,
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"ring.num_slots={num_slots} must be at least 1")
        layout = SlotLayout.plan(spec, max_tokens)
        self.limits = (max_tokens, max_sequences)
        self.memory = [
            Slot(layout, torch.empty(layout.slot_bytes, dtype=torch.uint8, device=device))
            for _ in range(num_slots)
        ]
        self.num_slots = num_slots
        self.headers: dict[int, tuple[Cursor, int, Slot, int]] = {}
        """Sequence number -> cursor, digest, slot, number of tokens; of slots not yet released."""
        self.published = 0
        self.released = 0
        self.has_ended = False
        self.error: str | None = None
        self.is_closed = False
        self._phases = {"engine": ("working", time.monotonic())}
        self._phases["trainer"] = self._phases["engine"]

    def enter(self, side: str, phase: str) -> None:
        """Note what a side does from now on."""
        self._phases[side] = (phase, time.monotonic())

    def release(self, count: int) -> None:
        """Free the oldest slots taken."""
        for seq in range(self.released, self.released + count):
            del self.headers[seq]
        self.released += count
        self.enter("trainer", "working")

    def slot(self, seq: int) -> Slot:
        return self.memory[seq % self.num_slots]

    def state(self) -> RingState:
        now = time.monotonic()
        engine, trainer = (
            SideState(phase, now - since, 0.0) for phase, since in self._phases.values()
        )
        return RingState("local", self.published, self.released, self.num_slots, engine, trainer)


class LocalWriter:
    """Implements `batch.FeatureSink`, with the errors of `channel.Writer`."""

    def __init__(self, slots: _Slots) -> None:
        self._slots = slots
        self._filling: TokenBatch | None = None
        self._is_open = True

    def acquire(self, tokens: TokenBatch, *, timeout_s: float) -> Features:
        """Return the views [T, width] of a free slot, to be filled before `publish`."""
        slots = self._slots
        self._require_open()
        if self._filling is not None:
            raise RuntimeError(
                f"acquire of {tokens.cursor}: {self._filling.cursor} is not yet published"
            )
        if slots.has_ended:
            raise RuntimeError(f"acquire of {tokens.cursor} after end or fail")
        check_size(tokens, *slots.limits)
        if slots.is_closed:
            raise Closed("the trainer has closed the ring and wants no more", slots.state())
        if slots.published - slots.released == slots.num_slots:
            raise RingTimeout(
                "no slot is free and this thread alone could free one "
                f"(timeout_s={timeout_s:g} has no effect); release a lease first",
                slots.state(),
            )
        self._filling = tokens
        slots.enter("engine", "filling a slot")
        return slots.slot(slots.published).features(tokens.num_tokens)

    def publish(self) -> None:
        """Hand the acquired slot over; its views must not be touched again."""
        if self._filling is None:
            raise RuntimeError("publish without acquire")
        tokens, self._filling = self._filling, None
        slots = self._slots
        if slots.has_ended:
            raise RuntimeError(f"publish of {tokens.cursor} after fail")
        slots.headers[slots.published] = (
            tokens.cursor, tokens.digest, slots.slot(slots.published), tokens.num_tokens,
        )  # fmt: skip
        slots.published += 1
        slots.enter("engine", "working")

    def end(self) -> None:
        """Say that no micro-batch follows those published. Without effect after `fail`."""
        self._require_open()
        if self._filling is not None and not self._slots.has_ended:
            raise RuntimeError(f"end: {self._filling.cursor} is not yet published")
        self._leave(None)

    def fail(self, error: str) -> None:
        """Leave `error` to the trainer. Without effect after `end`, `close` or an earlier one."""
        self._leave(error)

    def close(self) -> None:
        """Let go; without `end` or `fail` before, this is an error for the trainer. Idempotent."""
        if self._is_open:
            self._leave("the engine closed the ring before the end of its work")
            self._is_open = False
            self._slots.enter("engine", "closed")

    def stats(self) -> RingState:
        """Look at both sides: slots filled and phases."""
        return self._slots.state()

    def _leave(self, error: str | None) -> None:
        if not self._slots.has_ended:
            self._slots.has_ended = True
            self._slots.error = error
            self._slots.enter("engine", "ended" if error is None else "failed")

    def _require_open(self) -> None:
        if not self._is_open:
            raise Closed("this side has closed the ring", self._slots.state())


class LocalReader:
    """Implements `batch.FeatureSource`, with the errors of `channel.Reader`."""

    def __init__(self, slots: _Slots, *, copies: bool, poison: bool) -> None:
        self._slots = slots
        self._book = LeaseBook(copies=copies, poison=poison, release=slots.release)

    def acquire(self, *, timeout_s: float) -> SlotLease | None:
        """Return a lease of the oldest full slot; None after the engine's `end`."""
        slots = self._slots
        if slots.is_closed:
            raise Closed("this side has closed the ring", slots.state())
        seq = slots.released + self._book.num_held
        if seq < slots.published:
            slots.enter("trainer", "using a slot")
            return self._book.lease(*slots.headers[seq])
        if slots.error is not None:
            raise PeerFailed("the engine failed", slots.error, slots.state())
        if slots.has_ended:
            return None
        raise RingTimeout(
            "no slot is full and this thread alone could fill one "
            f"(timeout_s={timeout_s:g} has no effect); publish one first",
            slots.state(),
        )

    def close(self) -> None:
        """Tell the engine to stop and release all leases. Idempotent."""
        if not self._slots.is_closed:
            self._book.release_all()
            self._slots.is_closed = True
            self._slots.enter("trainer", "closed")

    def stats(self) -> RingState:
        """Look at both sides: slots filled and phases."""
        return self._slots.state()

    @property
    def fill(self) -> int:
        """Slots published and not yet released, those under lease among them."""
        return self.stats().filled
