"""Linear maps, rotations and picks of rows, where autograd's own way would save or move more.

Shape letters: n rows, H columns, N heads of size D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.kernels import choice
from colospec.draft.norm import RMSNorm
from colospec.draft.rope import rotate, rotate_, rotate_back


def linears(states: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Apply several linear maps [W, H] to states [n, H]; their gradients in the states are added
    up by the products themselves."""
    out: tuple[Tensor, ...] = _Linears.apply(states, *weights)  # type: ignore[no-untyped-call]
    return out


def linears_rotate(
    states: Tensor, weights: Sequence[Tensor], table: tuple[Tensor, Tensor], *, head_dim: int
) -> tuple[Tensor, ...]:
    """Return the heads [n, ., head_dim] that linear maps [., H] make of states [n, H], all but
    those of the last one rotated; backward needs nothing from before the rotation."""
    out: tuple[Tensor, ...] = _LinearsRotate.apply(states, *table, head_dim, *weights)  # type: ignore[no-untyped-call]
    return out


def norm_rotate(states: Tensor, norm: RMSNorm, table: tuple[Tensor, Tensor]) -> Tensor:
    """Norm each head of states [n, N * D], D the size of `norm`, and rotate it; [n, N, D]."""
    size = len(norm.weight)
    heads = states.view(len(states), states.shape[1] // size, size)
    if not choice.fused(states):
        return rotate(norm(heads.flatten(0, 1)).view_as(heads), table)
    out: Tensor = _NormRotate.apply(heads, norm.weight, norm.eps, *table)  # type: ignore[no-untyped-call]
    return out


def pick(states: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of `states` [., ...]; `rows` [n] int64, none of them twice."""
    return pick_each([states], rows, [len(rows)])


def pick_each(steps: Sequence[Tensor], rows: Tensor, sizes: list[int]) -> Tensor:
    """Return rows of several tensors [., ...] of one shape, one after another: of `rows` [n] int64
    the first `sizes[0]` of `steps[0]`, and so on; none of them twice."""
    out: Tensor = _Pick.apply(rows, sizes, *steps)  # type: ignore[no-untyped-call]
    return out


def linear_backward(
    grads: Sequence[Tensor], states: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of `states`, which several linear maps read, and of their weights."""
    total = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.addmm_(grad, weight)
    return total, [grad.T @ states for grad in grads]


class _Linears(Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(states, *weights)
        return tuple(F.linear(states, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        states, *weights = ctx.saved_tensors
        grad_states, grad_weights = linear_backward(grads, states, weights)
        return grad_states, *grad_weights


class _LinearsRotate(Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, head_dim: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(states, cos, sin, *weights)
        parts = [
            F.linear(states, weight).view(len(states), len(weight) // head_dim, head_dim)
            for weight in weights
        ]
        return *(rotate_(part, (cos, sin)) for part in parts[:-1]), parts[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, cos, sin, *weights = ctx.saved_tensors
        turned = [rotate_back(grad.contiguous(), (cos, sin)) for grad in grads[:-1]]
        parts = [grad.flatten(1) for grad in (*turned, grads[-1])]
        grad_states, grad_weights = linear_backward(parts, states, weights)
        return grad_states, None, None, None, *grad_weights


class _NormRotate(Function):
    """Saves its input alone, nothing between norm and rotation."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> Tensor:
        from colospec.draft.kernels import heads as kernels

        states = states.contiguous()
        ctx.save_for_backward(states, weight, cos, sin)
        ctx.eps = eps
        return kernels.norm_rotate(states, weight, eps, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from colospec.draft.kernels import heads as kernels

        states, weight, cos, sin = ctx.saved_tensors
        grads = kernels.norm_rotate_backward(grad.contiguous(), states, weight, ctx.eps, cos, sin)
        return *grads, None, None, None


class _Pick(Function):
    """A row occurs once, so the gradient is a copy: autograd would add it to zeros, element by
    element."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], *steps: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.sizes, ctx.num_rows = sizes, len(steps[0])
        out = steps[0].new_empty(len(rows), *steps[0].shape[1:])
        spans = zip(torch.split(rows, sizes), torch.split(out, sizes), strict=True)
        for step, (index, part) in zip(steps, spans, strict=True):
            torch.index_select(step, 0, index, out=part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        spans = zip(torch.split(rows, ctx.sizes), torch.split(grad, ctx.sizes), strict=True)
        grads = [
            part.new_zeros(ctx.num_rows, *part.shape[1:]).index_copy_(0, index, part)
            for index, part in spans
        ]
        return None, None, *grads
