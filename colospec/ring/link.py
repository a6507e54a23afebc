"""One attached side of a ring: C object, slots, the peer's pidfd; statuses become errors."""

from __future__ import annotations

import os
import time

from colospec import _ring
from colospec.ring.device import Streams
from colospec.ring.errors import (
    Closed,
    Corrupt,
    PeerDied,
    PeerFailed,
    RingError,
    RingState,
    RingTimeout,
    SideState,
)
from colospec.ring.spec import Slot

_ENGINE_PHASES = (
    "absent", "working", "waiting for a free slot", "filling a slot", "ended", "failed", "closed",
)  # fmt: skip
_TRAINER_PHASES = (
    "absent", "working", "waiting for features", "using a slot", "ended", "failed", "closed",
)  # fmt: skip
_AWAITED = {"engine": "published no features", "trainer": "released no slot"}


class Link:
    """What `Writer` and `Reader` share. `peer` is "engine" or "trainer"; `streams` write the
    counters where slots lie on a GPU."""

    def __init__(
        self,
        ring: _ring.Ring,
        slots: list[Slot],
        *,
        pair: str,
        peer: str,
        pidfd: int,
        streams: Streams | None = None,
    ) -> None:
        self.slots = slots
        self._streams = streams
        self._ring: _ring.Ring | None = ring
        self._pair = pair
        self._peer = peer
        self._num_slots = len(slots)
        self._pidfd = pidfd
        self._last_state: RingState | None = None
        self._opener = os.getpid()
        self._is_waiting = False

    @property
    def ring(self) -> _ring.Ring:
        """The C object. Raises Closed after `close`, and RuntimeError where it must not be used."""
        if self._ring is None:
            raise Closed("this side has closed the ring", self._last_state)
        if os.getpid() != self._opener:
            raise RuntimeError(
                f"ring {self._pair} was opened by process {self._opener}, and this is its child "
                f"{os.getpid()}; use a ring in the process that opened it"
            )
        if self._is_waiting:
            raise RuntimeError(
                f"ring {self._pair} is waiting for the {self._peer} already; use each side from "
                "one thread, and set a flag in signal handlers instead of using the ring there"
            )
        return self._ring

    def require_open(self) -> None:
        """Raise Closed after `close`."""
        _ = self.ring

    @property
    def is_open(self) -> bool:
        return self._ring is not None

    def wait(self, timeout_s: float, held: int = 0) -> tuple[int, int, bytes]:
        """Wait for the other side; return status, slot and note or text. `held`: slots in use."""
        ring = self.ring
        self._is_waiting = True
        try:
            return ring.wait(timeout_s, held, self._pidfd)
        finally:
            self._is_waiting = False

    def acquire(self, timeout_s: float, held: int = 0) -> tuple[int, bytes] | None:
        """Wait for a slot; return it and its note, None for END, or raise what hinders."""
        status, slot, detail = self.wait(timeout_s, held)
        if status == _ring.AGAIN:
            raise RingTimeout(
                f"the {self._peer} {_AWAITED[self._peer]} within {timeout_s:g} s", self.state()
            )
        if status == _ring.END:
            return None
        if status != _ring.READY:
            raise self._error(status, detail.decode(errors="replace"))
        return slot, detail

    def publish(self, note: bytes) -> None:
        """Publish the slot acquired last, in the order of the current stream."""
        streams = self._streams
        ring = self.ring
        self._require(
            ring.publish(note) if streams is None else ring.publish(note, streams.current())
        )

    def release(self, count: int) -> None:
        """Give back the oldest slots, in the order of the current stream."""
        streams = self._streams
        ring = self.ring
        self._require(
            ring.release(count) if streams is None else ring.release(count, streams.current())
        )

    def _require(self, status: int) -> None:
        if status != _ring.READY:
            raise self._error(status, "this side's own counter, overwritten by something else")

    def _error(self, status: int, detail: str) -> RingError:
        state = self.state()
        if status == _ring.CLOSED:
            return Closed("the trainer has closed the ring and wants no more", state)
        if status == _ring.DEAD:
            return PeerDied(
                f"the {self._peer}'s process has died; all that it published is delivered", state
            )
        if status == _ring.ERROR:
            return PeerFailed(f"the {self._peer} failed", detail, state)
        return self.corrupt(detail)

    def corrupt(self, what: str) -> Corrupt:
        """Make the error for shared memory that holds something impossible."""
        return Corrupt(f"the ring's shared memory is damaged: {what}", self.state())

    def state(self) -> RingState:
        """Look at both sides; after `close`, what was seen last."""
        if self._ring is None:
            assert self._last_state is not None
            return self._last_state
        published, released, engine, trainer = self._ring.state()
        return RingState(
            self._pair, published, released, self._num_slots,
            _side(engine, _ENGINE_PHASES), _side(trainer, _TRAINER_PHASES),
        )  # fmt: skip

    def detach(self) -> None:
        """Wait for what the GPU does with the slots, then drop them; memory goes when no view is
        left. Idempotent."""
        streams, self._streams = self._streams, None
        try:
            if streams is not None:
                streams.close()
        finally:
            self.slots = []

    def close(self) -> None:
        """Detach and drop the pidfd. Idempotent."""
        if self._ring is None:
            return
        try:
            self.detach()
        finally:
            self._last_state = self.state()
            self._ring = None
            os.close(self._pidfd)


def _side(raw: tuple[int, int, int], phases: tuple[str, ...]) -> SideState:
    phase, since_ns, wait_ns = raw
    name = phases[phase] if phase < len(phases) else f"in a damaged phase ({phase})"
    return SideState(name, (time.monotonic_ns() - since_ns) * 1e-9, wait_ns * 1e-9)
