"""Blocks whose slot k predicts token anchor + k + 1: the one behind the one in its place.

A slot is supervised where its label is, and all labels of the block before it: what follows a token
that nobody asked for is never verified in serving.

Shape letters: N blocks of b slots, P supervised slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from colospec.batch import TokenBatch
from colospec.draft.alignment import to_device
from colospec.draft.anchors import Blocks


@dataclass(frozen=True)
class ShiftedBlocks:
    """blocks: as for unshifted labels, except that its `places` are the slots, 0 to b - 1.

    previous [N * b] int64: the token that each slot follows, in the text; past the end of a
    document it means nothing. rows [P] int64: its packed position, for supervised slots.
    """

    blocks: Blocks
    previous: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> ShiftedBlocks:
        """Copy the tensors to `device`, without waiting for it."""
        return ShiftedBlocks(
            self.blocks.to(device), to_device(self.previous, device), to_device(self.rows, device)
        )


def shift_labels(tokens: TokenBatch, anchors: Tensor, blocks: Blocks) -> ShiftedBlocks:
    """Give the `blocks` of `anchors` [N] shifted labels; all tensors are on the CPU."""
    borders = tokens.cu_seqlens.to(torch.int64)
    end = borders[torch.searchsorted(borders, anchors, right=True)]
    last = max(tokens.num_tokens - 1, 0)
    rows = anchors[:, None] + torch.arange(blocks.size)
    label = (rows + 1).clamp(max=last)
    asked = (rows + 1 < end[:, None]) & tokens.loss_mask[label]
    block, slot = asked.cumprod(1).nonzero(as_tuple=True)
    return ShiftedBlocks(
        blocks=replace(
            blocks,
            slots=block * blocks.size + slot,
            labels=tokens.token_ids[label[block, slot]],
            places=slot,
            counts=tuple(torch.bincount(slot, minlength=blocks.size).tolist()),
        ),
        previous=tokens.token_ids[rows.clamp(max=last)].flatten(),
        rows=rows[block, slot],
    )
