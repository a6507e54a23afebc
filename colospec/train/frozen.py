"""The target's frozen embedding and head: read once, by trainer 0, and sent to the others."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from colospec.config import Weights
from colospec.draft.base import DraftModel
from colospec.target import Target


def share_frozen(
    target: Target, weights: Weights, *, device: torch.device, rank: int, world_size: int
) -> tuple[Tensor, Tensor | None]:
    """Return embedding and head [V, H] of the target on `device`; the head is None where tied.

    All trainers call it, on their default group. Raises ValueError, on rank 0, where the files do
    not fit config.json.
    """
    holder = DraftModel()
    if rank == 0:
        holder.load_target(target, weights=weights)
    else:
        shape = (target.vocab_size, target.hidden_size)
        number = 1 if target.tied else 2
        empty = (torch.empty(shape, dtype=target.dtype, device=device) for _ in range(number))
        holder.set_target(*empty)
    embedding = holder.embedding.to(device)
    head = None if holder.target_head is None else holder.target_head.to(device)
    if world_size > 1:
        for tensor in (embedding, head):
            if tensor is not None:
                dist.broadcast(tensor, src=0)
    return embedding, head
