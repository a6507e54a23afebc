"""RMSNorm, with an optional residual sum before it, and its gradients.

A row is one block. The weight's gradient is summed by a fixed number of programs, each over a run
of rows, and their parts by torch: always in the same order.

Shape letters: T rows, H columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_PROGRAMS = 512
NUM_WARPS = 8


def normalize(
    states: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    branch: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Write rms_norm(states) * weight to `out` [T, H]; return the scale of each row [T] float32.

    `states` and `out` may have any row stride. With `branch` [T, H] it is `states + branch` that is
    normalised, rounded to the type of `states` and written to `total` [T, H].
    """
    rows = _rows(states)
    target = out if out.dim() == 2 else out.view(rows.shape)
    scale = rows.new_empty(len(rows), dtype=torch.float32)
    # A tensor without rows has other strides, and would be compiled for.
    if not len(rows):
        return scale
    _forward_kernel[(len(rows),)](
        rows, rows if branch is None else branch.contiguous(), weight, target, scale,
        rows if total is None else total, eps,
        row_stride=rows.stride(0), out_stride=target.stride(0), num_columns=rows.shape[1],
        add=branch is not None, block=triton.next_power_of_2(rows.shape[1]), num_warps=NUM_WARPS,
    )  # fmt: skip
    return scale


def normalize_backward(
    grad: Tensor,
    states: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    wanted: bool = True,
    more: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of states [T, H] (None unless `wanted`) and of weight [H].

    `grad` and `states` may have any row stride; `more` [T, H] is added to the gradient of states.
    """
    rows, grad, num_columns = _rows(states), _rows(grad), states.shape[-1]
    more = None if more is None else more.contiguous()
    if not len(rows):
        return (torch.empty_like(states) if wanted else None), torch.zeros_like(weight)
    grad_states = rows.new_empty(len(rows) if wanted else 0, num_columns)
    parts = rows.new_empty(NUM_PROGRAMS, num_columns, dtype=torch.float32)
    _backward_kernel[(NUM_PROGRAMS,)](
        grad, rows, weight, scale, grad_states, parts, grad if more is None else more, len(rows),
        grad_stride=grad.stride(0), row_stride=rows.stride(0), num_columns=num_columns,
        wanted=wanted, add=more is not None, num_programs=NUM_PROGRAMS,
        block=triton.next_power_of_2(num_columns), num_warps=NUM_WARPS,
    )  # fmt: skip
    grad_weight = parts.sum(0).to(weight.dtype)
    return (grad_states.view(states.shape) if wanted else None), grad_weight


def _rows(states: Tensor) -> Tensor:
    """View as [T, H] with adjacent columns; a copy only where columns are not."""
    rows = states if states.dim() == 2 else states.reshape(-1, states.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def _forward_kernel(
    states: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    total: tl.tensor,
    eps: tl.tensor,
    row_stride: tl.constexpr,
    out_stride: tl.constexpr,
    num_columns: tl.constexpr,
    add: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < num_columns
    x = tl.load(states + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if add:
        x += tl.load(branch + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + row * num_columns + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(scales + row, scale)
    y = (x * scale * w).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, y, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grads: tl.tensor,
    states: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    more: tl.tensor,
    num_rows: tl.tensor,
    grad_stride: tl.constexpr,
    row_stride: tl.constexpr,
    num_columns: tl.constexpr,
    wanted: tl.constexpr,
    add: tl.constexpr,
    num_programs: tl.constexpr,
    block: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < num_columns
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros([block], tl.float32)
    row = program
    while row < num_rows:
        grad = tl.load(grads + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(states + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        normed = x * scale
        part += grad * normed
        if wanted:
            grad *= w
            mean = tl.sum(grad * normed, 0) / num_columns
            y = (grad - normed * mean) * scale
            if add:
                extra = tl.load(more + row * num_columns + columns, mask=inside, other=0.0)
                y += extra.to(tl.float32)
            tl.store(out + row * num_columns + columns, y.to(out.dtype.element_ty), mask=inside)
        row += num_programs
    tl.store(parts + program * num_columns + columns, part, mask=inside)
