"""The blocks of Domino: labels may be shifted by one, and the text of the block is read.

Shape letters: N blocks of b slots, P supervised slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from colospec.batch import TokenBatch
from colospec.draft.anchors import Blocks, build_blocks


def domino_blocks(
    tokens: TokenBatch, anchors: Tensor, *, block_size: int, mask_token_id: int, shift: bool
) -> tuple[Blocks, Tensor]:
    """Build the index maps for `anchors` [N], and the text of the blocks [N * b] int64; on the CPU.

    `shift` makes slot k predict token k + 1; `places` count the drafted tokens from 0 either way.
    Past the end of a document the text means nothing.
    """
    blocks = build_blocks(tokens, anchors, block_size=block_size, mask_token_id=mask_token_id)
    last = max(tokens.num_tokens - 1, 0)
    rows = anchors[:, None] + torch.arange(block_size)
    text = tokens.token_ids[rows.clamp(max=last)].flatten()
    if not shift:
        return blocks, text
    borders = tokens.cu_seqlens.to(torch.int64)
    end = borders[torch.searchsorted(borders, anchors, right=True)]
    label = (rows + 1).clamp(max=last)
    block, slot = ((rows + 1 < end[:, None]) & tokens.loss_mask[label]).nonzero(as_tuple=True)
    shifted = replace(
        blocks,
        slots=block * block_size + slot,
        labels=tokens.token_ids[label[block, slot]],
        places=slot,
        counts=tuple(torch.bincount(slot, minlength=block_size).tolist()),
    )
    return shifted, text
