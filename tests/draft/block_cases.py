"""Random packed documents with blocks, as the kernels of a block drafter get them."""

import torch

from colospec.batch import Cursor, TokenBatch
from colospec.draft.anchors import build_blocks, sample_anchors
from colospec.draft.domino.losses import pair_losses
from colospec.draft.dspark.losses import Rows, slot_losses


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


def head_inputs(rows, vocab_size, dtype, *, device="cpu", size=6, rank=3):
    """What losses under a corrected head compare, as whole numbers: their products are exact in
    every type, and logits are often equal. Some labels are the best tokens."""
    shapes = [(rows, size), (rows, rank), (rows, size), (vocab_size, size), (vocab_size, rank)]
    hidden, latent, teacher, head, correction = (
        torch.randint(-2, 3, shape, device=device).to(dtype) for shape in shapes
    )
    labels = torch.randint(0, vocab_size, (rows,), device=device)
    some = slice(0, rows // 2)
    logits = hidden[some].double() @ head.double().T + latent[some].double() @ correction.double().T
    labels[some] = logits.argmax(-1)
    weights = torch.rand(rows, device=device)
    return hidden, latent, teacher, head, correction, labels, weights


def corrected_losses(kind, inputs, algorithm, *, gradients=True, share=0.3):
    """Losses of head_inputs in `kind`: what Domino or DSpark tells of each slot, the total, and the
    gradients of hidden, latent and correction."""
    hidden, latent, teacher, head, correction, labels, weights = inputs
    leaves = [part.to(kind, copy=True) for part in (hidden, latent, correction)]
    for leaf in leaves:
        leaf.requires_grad_(gradients)
    hidden, latent, correction = leaves
    weights, head = weights.to(torch.promote_types(kind, torch.float32)), head.to(kind)
    with torch.set_grad_enabled(gradients):
        if algorithm == "domino":
            total, *told = pair_losses(
                hidden, latent, head, correction, labels, weights, base_share=share, chunk_tokens=7
            )
        else:
            asked = torch.linspace(0, max(len(labels) * 2 // 3 - 1, 0), len(labels)).long()
            rows = Rows(hidden, latent, teacher.to(kind), asked, labels, weights)
            total, *told = slot_losses(
                rows, head, correction, ce_weight=0.3, l1_weight=0.7, chunk_tokens=7
            )
    grads = torch.autograd.grad(total, leaves) if gradients else []
    return [part.detach() for part in told], total.detach(), grads
