"""What block drafters do with rows, where autograd's own way would move them more often.

Shape letters: n rows, H columns, N heads of size D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.kernels import choice
from colospec.draft.layer import RMSNorm, linear_backward
from colospec.draft.rope import rotate


def linears(states: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Apply several linear maps [W, H] to states [n, H]; their gradients in the states are added
    up by the products themselves."""
    out: tuple[Tensor, ...] = _Linears.apply(states, *weights)  # type: ignore[no-untyped-call]
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
    out: Tensor = _Pick.apply(states, rows)  # type: ignore[no-untyped-call]
    return out


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
    """Autograd would add the gradients to zeros, element by element."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(states)
        return states.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, rows, grad), None
