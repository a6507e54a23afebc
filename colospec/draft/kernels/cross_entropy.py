"""Cross entropy of logits with labels, and its gradient written over them.

One program is one row, and walks over its columns twice: once for the log-sum-exp and the largest
logit, once for the gradient. Logits are of the type of the matrix product; the rest is float32.

Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
NUM_WARPS = 8


def cross_entropy_(
    logits: Tensor, labels: Tensor, loss: Tensor, right: Tensor, *, gradients: bool
) -> None:
    """Compare logits [R, V] with labels [R] int64.

    Writes the loss [R] float32, and to `right` [R] bool whether the label is the first of the
    largest logits. With `gradients`, `logits` become those of the loss, softmax - label.
    """
    if len(logits):
        _cross_entropy_kernel[(len(logits),)](
            logits, labels, loss, right,
            num_columns=logits.shape[1], gradients=gradients, block=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


@triton.jit
def log_sum_exp(
    row: tl.tensor, num_columns: tl.constexpr, block: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the log-sum-exp of the logits from `row` on, and the first column of the largest."""
    lanes = tl.arange(0, block)
    top = -float("inf")
    total = tl.zeros([block], tl.float32)
    lane_top = tl.full([block], float("-inf"), tl.float32)
    lane_column = tl.zeros([block], tl.int32)
    for start in range(0, num_columns, block):
        columns = start + lanes
        x = tl.load(row + columns, mask=columns < num_columns, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
        lane_column = tl.where(x > lane_top, columns, lane_column)
        lane_top = tl.maximum(lane_top, x)
    first = tl.min(tl.where(lane_top == top, lane_column, num_columns), 0)
    return top + tl.log(tl.sum(total, 0)), first


@triton.jit
def compare_label(
    logits: tl.tensor,
    row: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor,
    right: tl.tensor,
    num_columns: tl.constexpr,
    block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Write the cross entropy of `row`, whose logits begin at `logits`, and whether its label is
    the best token; return the label, the log-sum-exp and the best token."""
    label = tl.load(labels + row).to(tl.int32)
    chosen = tl.load(logits + label).to(tl.float32)
    norm, best = log_sum_exp(logits, num_columns, block)
    tl.store(losses + row, norm - chosen)
    tl.store(right + row, best == label)
    # All threads have read the label's logit before one of them writes a gradient over it.
    tl.debug_barrier()
    return label, norm, best


# Chunks begin anywhere in these.
@triton.jit(do_not_specialize_on_alignment=["labels", "loss", "right"])
def _cross_entropy_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    loss: tl.tensor,
    right: tl.tensor,
    num_columns: tl.constexpr,
    gradients: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns
    label, norm, _ = compare_label(logits, row, labels, loss, right, num_columns, block)
    if gradients:
        lanes = tl.arange(0, block)
        for start in range(0, num_columns, block):
            columns = start + lanes
            inside = columns < num_columns
            x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
            grad = tl.exp(x - norm) - tl.where(columns == label, 1.0, 0.0)
            tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=inside)
