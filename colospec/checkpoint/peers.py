"""The trainers as one: each outcome, good or bad, is the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Peers:
    """Agreement over one process group, or of one process with itself (`group` None).

    Every call is made by all ranks of the group, from one thread at a time.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, rank: int, world_size: int) -> None:
        if group is None and world_size > 1:
            raise ValueError(f"{world_size} trainers need a process group to agree")
        self.group, self.rank, self.world_size = group, rank, world_size

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, by rank, on all ranks."""
        values = [value] * self.world_size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_rank0(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 alone; return its result, or raise its exception, on all ranks."""
        outcome: list[T | Exception | None] = [None]
        if self.rank == 0:
            try:
                outcome = [work()]
            except Exception as error:
                outcome = [error]
        if self.group is not None:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        result = outcome[0]
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[return-value]
