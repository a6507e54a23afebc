"""Cross entropy with labels and distance to the target's distribution, with their gradient.

One program is one row, and walks over its columns: once for each side's log-sum-exp, once for the
distance of the two distributions, once for the gradient. Logits are of the type of the matrix
product; the rest is float32.

Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from colospec.draft.kernels.cross_entropy import BLOCK, NUM_WARPS, compare_label, log_sum_exp

if TYPE_CHECKING:
    from colospec.draft.dspark.losses import Found, Teacher


def distance_(
    logits: Tensor,
    teacher: Teacher,
    labels: Tensor,
    found: Found,
    loss_weights: tuple[float, float],
    *,
    gradients: bool,
) -> None:
    """Compare logits [R, V] with labels [R] int64 and with the target's logits of `teacher`.

    Writes to `found`: cross_entropy and distance [R] float32, the sum of |q - p|; right and agrees
    [R] bool, whether the first of the largest logits is the label, and is the target's. With
    `gradients`, `logits` become those of loss_weights @ (cross_entropy, distance).
    """
    if len(logits):
        _distance_kernel[(len(logits),)](
            logits, *teacher, labels, *found,
            ce_weight=loss_weights[0], l1_weight=loss_weights[1], num_columns=logits.shape[1],
            gradients=gradients, block=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


# Chunks begin anywhere in these.
@triton.jit(
    do_not_specialize_on_alignment=["labels", "cross_entropies", "distances", "right", "agrees"]
)
def _distance_kernel(
    logits: tl.tensor,
    wanted: tl.tensor,
    teacher_rows: tl.tensor,
    labels: tl.tensor,
    cross_entropies: tl.tensor,
    distances: tl.tensor,
    right: tl.tensor,
    agrees: tl.tensor,
    ce_weight: tl.constexpr,
    l1_weight: tl.constexpr,
    num_columns: tl.constexpr,
    gradients: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns
    wanted += tl.load(teacher_rows + row) * num_columns
    label, norm_q, best_q = compare_label(
        logits, row, labels, cross_entropies, right, num_columns, block
    )
    norm_p, best_p = log_sum_exp(wanted, num_columns, block)
    tl.store(agrees + row, best_q == best_p)

    lanes = tl.arange(0, block)
    distance = tl.zeros([block], tl.float32)
    drift = tl.zeros([block], tl.float32)
    for start in range(0, num_columns, block):
        columns = start + lanes
        inside = columns < num_columns
        q = _odds(logits + columns, norm_q, inside)
        gap = q - _odds(wanted + columns, norm_p, inside)
        distance += tl.abs(gap)
        drift += q * _sign(gap)
    tl.store(distances + row, tl.sum(distance, 0))
    mean = tl.sum(drift, 0)

    if gradients:
        for start in range(0, num_columns, block):
            columns = start + lanes
            inside = columns < num_columns
            q = _odds(logits + columns, norm_q, inside)
            side = _sign(q - _odds(wanted + columns, norm_p, inside))
            grad = q * (ce_weight + l1_weight * (side - mean))
            grad -= tl.where(columns == label, ce_weight, 0.0)
            tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _odds(logits: tl.tensor, norm: tl.tensor, inside: tl.tensor) -> tl.tensor:
    x = tl.load(logits, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.exp(x - norm)


@triton.jit
def _sign(x: tl.tensor) -> tl.tensor:
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
