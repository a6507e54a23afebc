"""What can go wrong between an engine and its trainer; every error shows both sides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SideState:
    """What one side was last seen doing, for how long, and its waits for the other side so far."""

    phase: str
    age_s: float
    wait_s: float


@dataclass(frozen=True)
class RingState:
    """A look at a ring: slots published and released since it began, and both sides."""

    pair: str
    published: int
    released: int
    num_slots: int
    engine: SideState
    trainer: SideState

    @property
    def filled(self) -> int:
        """Slots that are published and not yet released."""
        return self.published - self.released

    def __str__(self) -> str:
        return (
            f"ring {self.pair}: published {self.published}, released {self.released}, "
            f"{self.num_slots} slots; engine {self.engine.phase} for {self.engine.age_s:.1f} s, "
            f"trainer {self.trainer.phase} for {self.trainer.age_s:.1f} s"
        )


def describe(message: str, state: RingState | None) -> str:
    """Join an error's message with the state of the ring."""
    return f"{message} [{state}]" if state is not None else message


class RingError(RuntimeError):
    """The base of errors that end the use of a ring. `state` is None before the attach."""

    def __init__(self, message: str, state: RingState | None = None) -> None:
        super().__init__(describe(message, state))
        self.state = state


class Closed(RingError):
    """The trainer wants no more, or this side has been closed."""


class PeerDied(RingError):
    """The process of the other side is gone; all that it published has been delivered."""


class PeerFailed(RingError):
    """The other side failed and left `text`; all that it published has been delivered."""

    def __init__(self, message: str, text: str, state: RingState | None = None) -> None:
        super().__init__(f"{message}: {text}", state)
        self.text = text


class Corrupt(RingError):
    """The shared memory holds something that the protocol cannot have written."""


class SpecMismatch(ValueError):
    """Engine and trainer were started with different settings; raised on both sides."""


class RingTimeout(TimeoutError):
    """The other side lives, but did not move before the deadline. `state` says what it was at."""

    def __init__(self, message: str, state: RingState | None = None) -> None:
        super().__init__(describe(message, state))
        self.state = state


def shorten(text: str, limit_bytes: int) -> bytes:
    """Encode as UTF-8 of at most `limit_bytes`, cutting out the middle where it is longer."""
    raw = text.encode(errors="backslashreplace")
    if len(raw) <= limit_bytes:
        return raw
    gap = b" [...] "
    half = (limit_bytes - len(gap)) // 2
    begin = raw[:half].decode(errors="ignore").encode()
    return begin + gap + raw[-half:].decode(errors="ignore").encode()
