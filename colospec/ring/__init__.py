"""Slots that carry features from an engine to its trainer.

`channel` joins two processes through shared memory, `local` serves one process. The errors are
here, so that naming one costs no import of torch.
"""

from colospec.ring.errors import (
    Closed,
    Corrupt,
    PeerDied,
    PeerFailed,
    RingError,
    RingState,
    RingTimeout,
    SideState,
    SpecMismatch,
)

__all__ = [
    "Closed",
    "Corrupt",
    "PeerDied",
    "PeerFailed",
    "RingError",
    "RingState",
    "RingTimeout",
    "SideState",
    "SpecMismatch",
]
