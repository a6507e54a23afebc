"""Full slots in the trainer's hands."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from colospec.batch import Cursor, Features
from colospec.ring.spec import Slot


class SlotLease:
    """Implements `batch.Lease`; `give_back` is called once, by the first `release`.

    The features of a view lease lie in the slot: after `release` the engine overwrites them.
    """

    def __init__(
        self,
        cursor: Cursor,
        digest: int,
        features: Features,
        give_back: Callable[[SlotLease], None],
    ) -> None:
        self._cursor = cursor
        self._digest = digest
        self._features: Features | None = features
        self._give_back = give_back

    @property
    def cursor(self) -> Cursor:
        return self._cursor

    @property
    def digest(self) -> int:
        return self._digest

    @property
    def features(self) -> Features:
        """Raises RuntimeError after `release`."""
        if self._features is None:
            raise RuntimeError(
                f"the slot of {self._cursor} has been released; read its features before, "
                "or clone them"
            )
        return self._features

    @property
    def is_released(self) -> bool:
        return self._features is None

    def release(self) -> None:
        """Give the slot back; the features must not be read again. Idempotent."""
        if self._features is not None:
            self._features = None
            self._give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class LeaseBook:
    """Hands out leases and gives slots back in the order in which they were taken.

    `release(n)` frees the n oldest slots. `copies`: clone the features and free the slot at once.
    `poison`: fill a slot with NaN before it is freed.
    """

    def __init__(self, *, copies: bool, poison: bool, release: Callable[[int], None]) -> None:
        self._copies = copies
        self._poison = poison
        self._release = release
        self._held: deque[tuple[SlotLease, Slot]] = deque()

    @property
    def num_held(self) -> int:
        """Slots taken and not yet given back."""
        return len(self._held)

    def lease(self, cursor: Cursor, digest: int, slot: Slot, num_tokens: int) -> SlotLease:
        """Hand out the slot that was taken last."""
        features = slot.features(num_tokens)
        if self._copies:
            features = _clone(features)
            self._scrub(slot)
            self._release(1)
            return SlotLease(cursor, digest, features, lambda _: None)
        lease = SlotLease(cursor, digest, features, self._give_back)
        self._held.append((lease, slot))
        return lease

    def release_all(self) -> None:
        """Release the leases that are still held."""
        for lease, _ in list(self._held):
            lease.release()

    def _give_back(self, released: SlotLease) -> None:
        self._scrub(next(slot for lease, slot in self._held if lease is released))
        count = 0
        while self._held and self._held[0][0].is_released:
            self._held.popleft()
            count += 1
        if count:
            self._release(count)

    def _scrub(self, slot: Slot) -> None:
        if self._poison:
            slot.poison()


def _clone(features: Features) -> Features:
    last = features.last_hidden_states
    return Features(features.aux_hidden_states.clone(), None if last is None else last.clone())
