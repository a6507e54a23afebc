"""Random packed documents with blocks, as the kernels of a block drafter get them."""

import torch

from colospec.batch import Cursor, TokenBatch
from colospec.draft.anchors import build_blocks, sample_anchors


def make_blocks(lengths, *, size, num_anchors, density=0.9):
    """Blocks at random anchors, on the CPU."""
    masks = [torch.rand(n) < density for n in lengths]
    ids = [torch.zeros(n, dtype=torch.int64) for n in lengths]
    tokens = TokenBatch.pack(Cursor(0, 0, 0), range(len(lengths)), ids, masks)
    anchors = sample_anchors(tokens, num_anchors=num_anchors, generator=None)
    return build_blocks(tokens, anchors, block_size=size, mask_token_id=1)


def make_leaves(blocks, heads, head_dim, dtype, device="cpu"):
    """Queries, keys and values of the context, keys and values of the blocks."""
    num_slots, num_rows = len(blocks.input_ids), len(blocks.context_rows)

    def normal(rows, count):
        return torch.randn(rows, count, head_dim, device=device).to(dtype)

    return [
        normal(num_slots, heads[0]),
        *(normal(rows, heads[1]) for rows in (num_rows, num_rows, num_slots, num_slots)),
    ]
