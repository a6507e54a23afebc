"""What variants of DFlash do with the text of a block: they read it, and may predict one further.

Shape letters: N blocks of b slots, P supervised slots, Q positions that they stand at.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from colospec.batch import TokenBatch
from colospec.draft.anchors import Blocks


def block_text(tokens: TokenBatch, anchors: Tensor, *, size: int) -> Tensor:
    """Return the tokens of the blocks of `size` at `anchors` [N], [N * b] int64, on the CPU; past
    the end of a document they mean nothing."""
    rows = anchors[:, None] + torch.arange(size)
    return tokens.token_ids[rows.clamp(max=max(tokens.num_tokens - 1, 0))].flatten()


def shift_labels(
    tokens: TokenBatch, anchors: Tensor, blocks: Blocks, *, unbroken: bool
) -> tuple[Blocks, Tensor]:
    """Let slot k of the `blocks` of `anchors` [N] predict token anchor + k + 1, the one behind the
    one in its place; all tensors are on the CPU.

    A slot is supervised where its label is. `unbroken` asks that of all labels of the block before
    it, too: what follows a token that nobody asked for is never verified in serving.

    Returns the blocks, whose `places` are now the slots, 0 to b - 1, and the packed position that
    each supervised slot stands at, [P] int64.
    """
    borders = tokens.cu_seqlens.to(torch.int64)
    end = borders[torch.searchsorted(borders, anchors, right=True)]
    rows = anchors[:, None] + torch.arange(blocks.size)
    label = (rows + 1).clamp(max=max(tokens.num_tokens - 1, 0))
    asked = (rows + 1 < end[:, None]) & tokens.loss_mask[label]
    block, slot = (asked.cumprod(1) if unbroken else asked).nonzero(as_tuple=True)
    shifted = replace(
        blocks,
        slots=block * blocks.size + slot,
        labels=tokens.token_ids[label[block, slot]],
        places=slot,
        counts=tuple(torch.bincount(slot, minlength=blocks.size).tolist()),
    )
    return shifted, rows[block, slot]


def share_rows(blocks: Blocks, rows: Tensor) -> tuple[Blocks, Tensor, Tensor]:
    """Bring the supervised slots of `blocks` into the order of the packed positions `rows` [P] that
    they stand at, on the CPU.

    Returns the blocks, the positions [Q], each once, and which of them each slot has [P], both
    ascending.
    """
    order = rows.argsort(stable=True)
    positions, index = torch.unique_consecutive(rows[order], return_inverse=True)
    ordered = replace(
        blocks,
        slots=blocks.slots[order],
        labels=blocks.labels[order],
        places=blocks.places[order],
    )
    return ordered, positions, index
