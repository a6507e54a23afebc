"""`ring.*`: the slots between an engine and its trainer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colospec.config.ranges import check_numbers


class RingPayload(Enum):
    """Where slots lie on a GPU: ipc in its memory, host in pinned memory; auto is ipc where CUDA
    IPC works. A CPU has host memory alone."""

    auto = "auto"
    ipc = "ipc"
    host = "host"


class RingLease(Enum):
    """view reads the slot in place until backward is done; copy copies out and frees it at once."""

    view = "view"
    copy = "copy"


@dataclass
class RingConfig:
    num_slots: int = 3
    """Micro-batches that an engine may be ahead of its trainer."""
    lease: RingLease = RingLease.view
    payload: RingPayload = RingPayload.auto

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        check_numbers(self, prefix="ring.", at_least={"num_slots": 1})
