"""How all trainers agree to stop, between steps and between the parts of an evaluation."""

from __future__ import annotations

import torch
import torch.distributed as dist


class StopRequestedError(Exception):
    """Somebody asks the job to stop, and what was under way is not finished."""


class StopVote:
    """Agreement of all trainers to stop before the same piece of work.

    The vote is started one piece ahead and read one later, so nobody waits for it.
    """

    def __init__(self, want: bool) -> None:
        self._votes = torch.tensor([int(want)])
        self._work = dist.all_reduce(self._votes, async_op=True)

    def wait_any(self) -> bool:
        """Return whether any trainer wants to stop."""
        if self._work is not None:
            self._work.wait()
        return bool(self._votes.item())
