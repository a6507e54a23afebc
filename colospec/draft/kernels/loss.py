"""The vocabulary side of the loss: log-sum-exp of the teacher, and draft against teacher.

One program is one row, and walks over the columns in blocks; a row of each side stays in the L2
cache between its passes. Logits are of the type of the matrix product; everything else is float32.

Blocks have a fixed size: a block smaller than the threads of a program would be loaded several
times, and the gradient is written over the logits. Sizes that differ from batch to batch are plain
arguments, never compiled in.

Shape letters: C teacher rows of a chunk, R rows of a step, V target vocabulary, W draft vocabulary,
P supervised positions of all steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from colospec.draft.settings import Loss

# Columns of the target's vocabulary whose logits exist at a time.
PIECE = 32_768
BLOCK = 4096
NUM_WARPS = 8
GATHER_BLOCK, GATHER_ROWS = 1024, 8


@dataclass(frozen=True)
class TeacherRows:
    """Teacher distributions of C rows as their logits.

    logits [C, W], of the type of the head; norm and full_norm [C] float32: log-sum-exp of the
    logits over the draft's and over the target's vocabulary; token [C] int64: the most likely token
    in target ids; kept [C] float32: 1 where the draft can say it; target_ids [W] int64 or None.
    """

    logits: Tensor
    norm: Tensor
    full_norm: Tensor
    token: Tensor
    kept: Tensor
    target_ids: Tensor | None


@dataclass(frozen=True)
class StepSettings:
    """Which loss, and its weight at this step."""

    kind: Loss
    lk_eta: float
    weight: float
    min_acceptance: float


def teacher_rows(last: Tensor, head: Tensor, target_ids: Tensor | None) -> TeacherRows:
    """Apply the target's head [V, H] to `last` [C, H]; `target_ids` is ascending."""
    scan = _Scan(last)
    if target_ids is None:
        logits = last @ head.T
        scan.add(logits, 0)
        norm = scan.norm()
        return TeacherRows(logits, norm, norm, scan.token, torch.ones_like(norm), None)
    logits = last.new_empty(len(last), len(target_ids))
    for first in range(0, len(head), PIECE):
        piece = last @ head[first : first + PIECE].T
        scan.add(piece, first)
        _gather(piece, first, target_ids, logits)
        # Or two pieces would live while the next one is computed.
        del piece
    pruned = _Scan(last)
    pruned.add(logits, 0)
    slot = torch.searchsorted(target_ids, scan.token).clamp_(max=len(target_ids) - 1)
    kept = (target_ids[slot] == scan.token).to(torch.float32)
    return TeacherRows(logits, pruned.norm(), scan.norm(), scan.token, kept, target_ids)


def compare(
    logits: Tensor,
    teacher: TeacherRows,
    slots: tuple[Tensor, int, int],
    terms: Tensor,
    settings: StepSettings,
    *,
    gradients: bool,
) -> None:
    """Compare draft logits [R, W] with their teachers, and write the gradient over them.

    slots: (tensor [P], first, chunk): the teacher of row i is row tensor[first + i] - chunk.
    terms [3, P] float32 receives in columns first..first + R the weighted loss, whether both sides'
    most likely tokens agree, and the acceptance rate. The gradient is that of the weighted loss.
    """
    indices, first, chunk = slots
    ids = teacher.token if teacher.target_ids is None else teacher.target_ids
    _compare_kernel[(len(logits),)](
        logits, teacher.logits, teacher.norm, teacher.full_norm, teacher.token, teacher.kept,
        ids, indices, terms, first, chunk, terms.shape[1], settings.weight, settings.lk_eta,
        num_columns=logits.shape[1], kind=settings.kind.value, gradients=gradients,
        pruned=teacher.target_ids is not None, min_acceptance=settings.min_acceptance,
        block=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


class _Scan:
    """Log-sum-exp and argmax of C rows whose columns come in pieces."""

    def __init__(self, rows: Tensor) -> None:
        self.top = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
        self.total = rows.new_zeros(len(rows), dtype=torch.float32)
        self.token = rows.new_zeros(len(rows), dtype=torch.int64)

    def add(self, piece: Tensor, first: int) -> None:
        """Take the next columns [C, width]; the first of them is column `first`."""
        _scan_kernel[(len(piece),)](
            piece, self.top, self.total, self.token, first,
            width=piece.shape[1], block=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip

    def norm(self) -> Tensor:
        """Return the log-sum-exp [C] of what was added."""
        return self.top + self.total.log()


def _gather(piece: Tensor, first: int, target_ids: Tensor, out: Tensor) -> None:
    """Copy those columns of `piece` that the draft has to their places in `out` [C, W]."""
    grid = (triton.cdiv(len(piece), GATHER_ROWS), triton.cdiv(len(target_ids), GATHER_BLOCK))
    _gather_kernel[grid](
        piece, target_ids, out, first, len(piece),
        width=piece.shape[1], num_columns=len(target_ids), rows=GATHER_ROWS, block=GATHER_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def _scan_kernel(
    piece: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    piece += row * width
    lanes = tl.arange(0, block)
    old_top = tl.load(tops + row)
    top = old_top
    total = tl.zeros([block], tl.float32)
    lane_top = tl.full([block], float("-inf"), tl.float32)
    lane_column = tl.zeros([block], tl.int32)
    for start in range(0, width, block):
        columns = start + lanes
        x = tl.load(piece + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
        lane_column = tl.where(x > lane_top, columns, lane_column)
        lane_top = tl.maximum(lane_top, x)
    old_total = tl.load(totals + row) * tl.exp(old_top - top)
    tl.store(totals + row, tl.sum(total, 0) + old_total)
    tl.store(tops + row, top)
    # Of equal logits the first one counts, within a piece and between pieces.
    column = tl.min(tl.where(lane_top == top, lane_column, width), 0)
    tl.store(tokens + row, (first + column).to(tl.int64), mask=top > old_top)


@triton.jit(do_not_specialize=["first", "num_rows"])
def _gather_kernel(
    piece: tl.tensor,
    target_ids: tl.tensor,
    out: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    width: tl.constexpr,
    num_columns: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    columns = tl.program_id(1) * block + tl.arange(0, block)
    ids = tl.load(target_ids + columns, mask=columns < num_columns, other=-1) - first
    inside = (ids >= 0) & (ids < width)
    for i in range(rows):
        row = tl.program_id(0).to(tl.int64) * rows + i
        mask = inside & (row < num_rows)
        value = tl.load(piece + row * width + ids, mask=mask)
        tl.store(out + row * num_columns + columns, value, mask=mask)


@triton.jit(
    do_not_specialize=["first", "chunk", "num_terms"], do_not_specialize_on_alignment=["slots"]
)
def _compare_kernel(
    logits: tl.tensor,
    teacher: tl.tensor,
    norms: tl.tensor,
    full_norms: tl.tensor,
    tokens: tl.tensor,
    kept: tl.tensor,
    target_ids: tl.tensor,
    slots: tl.tensor,
    terms: tl.tensor,
    first: tl.tensor,
    chunk: tl.tensor,
    num_terms: tl.tensor,
    step_weight: tl.tensor,
    eta: tl.tensor,
    num_columns: tl.constexpr,
    kind: tl.constexpr,
    gradients: tl.constexpr,
    pruned: tl.constexpr,
    min_acceptance: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + first + row) - chunk
    logits += row * num_columns
    teacher += slot * num_columns
    norm_p = tl.load(norms + slot)
    mass = tl.exp(norm_p - tl.load(full_norms + slot))
    weight = step_weight * tl.load(kept + slot)
    lanes = tl.arange(0, block)

    top = -float("inf")
    total = tl.zeros([block], tl.float32)
    product = tl.zeros([block], tl.float32)
    for start in range(0, num_columns, block):
        inside = start + lanes < num_columns
        x = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        z = tl.load(teacher + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
        product += tl.where(inside, tl.exp(z - norm_p) * x, 0.0)
    norm_q = top + tl.log(tl.sum(total, 0))
    cross_entropy = norm_q - tl.sum(product, 0)

    overlap = tl.zeros([block], tl.float32)
    low = tl.zeros([block], tl.float32)
    column = tl.full([block], num_columns, tl.int32)
    for start in range(0, num_columns, block):
        columns = start + lanes
        inside = columns < num_columns
        x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        z = tl.load(teacher + columns, mask=inside, other=float("-inf")).to(tl.float32)
        q = tl.exp(x - norm_q)
        p = tl.exp(z - norm_p)
        overlap += tl.minimum(p * mass, q)
        column = tl.minimum(column, tl.where(x == top, columns, num_columns))
        if gradients:
            if kind == "kl":
                grad = (q - p) * weight
                tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=inside)
            else:
                low += tl.where(q <= p * mass, q, 0.0)
    acceptance = tl.sum(overlap, 0)

    bounded = tl.maximum(acceptance, min_acceptance)
    share = tl.exp(-eta * acceptance)
    loss = cross_entropy
    if kind == "lk_alpha":
        loss = -tl.log(bounded)
    if kind == "lk_lambda":
        loss = (1 - share) * (1 - acceptance) + share * cross_entropy
    # Without a largest logit (all are NaN) any column will do.
    token = tl.minimum(tl.min(column, 0), num_columns - 1).to(tl.int64)
    if pruned:
        token = tl.load(target_ids + token)
    hit = tl.where(token == tl.load(tokens + slot), 1.0, 0.0)
    terms += first + row
    tl.store(terms, loss * weight)
    tl.store(terms + num_terms, hit)
    tl.store(terms + num_terms.to(tl.int64) * 2, acceptance)

    # The acceptance grows only with the probabilities that are below the target's.
    if gradients and kind != "kl":
        below = tl.sum(low, 0)
        if kind == "lk_alpha":
            weight = tl.where(acceptance > min_acceptance, weight / bounded, 0.0)
        for start in range(0, num_columns, block):
            columns = start + lanes
            inside = columns < num_columns
            x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
            z = tl.load(teacher + columns, mask=inside, other=float("-inf")).to(tl.float32)
            q = tl.exp(x - norm_q)
            p = tl.exp(z - norm_p)
            grad = q * below - tl.where(q <= p * mass, q, 0.0)
            if kind == "lk_lambda":
                grad = (1 - share) * grad + share * (q - p)
            tl.store(logits + columns, (grad * weight).to(logits.dtype.element_ty), mask=inside)
