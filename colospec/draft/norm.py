"""RMSNorm alone, of two tensors side by side, and of a sum, with what autograd would save twice.

Statistics are float32, or float64 for float64 states. On CUDA all of it runs as kernels.

Shape letters: T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from colospec.draft.kernels import choice


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32; saves its input and one number per row."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(states, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out

    def add(self, states: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return states + branch (None: the states) and that normed; both gradients come back as
        one."""
        out: tuple[Tensor, Tensor] = _AddNorm.apply(states, branch, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


def norm_pair(left: Tensor, right: Tensor, norms: tuple[RMSNorm, RMSNorm]) -> Tensor:
    """Return two tensors [T, D] normed, each by its own of `norms`, side by side, [T, 2 D]."""
    first, second = norms
    out: Tensor = _NormPair.apply(left, right, first.weight, second.weight, first.eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = states.new_empty(states.shape)
        ctx.save_for_backward(states, weight, _normalize(states, weight, eps, out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0]
        return *_normalize_backward(grad, *ctx.saved_tensors, wanted=wanted), None


class _NormPair(Function):
    """Two normed tensors [T, D] side by side, [T, 2 D]."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, weight: Tensor, other: Tensor, eps: float
    ) -> Tensor:
        out = left.new_empty(len(left), 2 * left.shape[1])
        halves = out.chunk(2, dim=1)
        scales = _normalize(left, weight, eps, halves[0]), _normalize(right, other, eps, halves[1])
        ctx.save_for_backward(left, right, weight, other, *scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, weight, other, *scales = ctx.saved_tensors
        halves = grad.chunk(2, dim=1)
        first, second = ctx.needs_input_grad[:2]
        grad_left, grad_weight = _normalize_backward(
            halves[0], left, weight, scales[0], wanted=first
        )
        grad_right, grad_other = _normalize_backward(
            halves[1], right, other, scales[1], wanted=second
        )
        return grad_left, grad_right, grad_weight, grad_other, None


class _AddNorm(Function):
    """The sum of two tensors [T, D], and the normed sum; saves the sum."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, branch: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(states)
        if branch is None:
            total = states
            scale = _normalize(states, weight, eps, out)
        elif choice.fused(states):
            from colospec.draft.kernels import norm as kernels

            total = torch.empty_like(states)
            scale = kernels.normalize(states, weight, eps, out, branch=branch, total=total)
        else:
            total = states + branch
            scale = _normalize(total, weight, eps, out)
        ctx.save_for_backward(total, weight, scale)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.needs_input_grad[:2]
        grad_states, grad_weight = _normalize_backward(
            grad, *ctx.saved_tensors, wanted=first or second, more=grad_total
        )
        return grad_states, grad_states if second else None, grad_weight, None


def _normalize(states: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Write the normed `states` times `weight` to `out`; return the scale of each row."""
    if choice.fused(states):
        from colospec.draft.kernels import norm as kernels

        return kernels.normalize(states, weight, eps, out)
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    scale = torch.rsqrt(torch.linalg.vecdot(wide, wide).unsqueeze(-1) / wide.shape[-1] + eps)
    out.copy_((wide * scale).mul_(weight))
    return scale


def _normalize_backward(
    grad: Tensor,
    states: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    wanted: bool,
    more: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of states (None unless `wanted`), plus `more`, and of weight."""
    if choice.fused(states):
        from colospec.draft.kernels import norm as kernels

        return kernels.normalize_backward(grad, states, weight, scale, wanted=wanted, more=more)
    normed = states * scale
    grad_weight = torch.einsum("td,td->d", grad.to(scale.dtype), normed).to(weight.dtype)
    if not wanted:
        return None, grad_weight
    grad_normed = grad * weight.to(scale.dtype)
    mean = torch.linalg.vecdot(grad_normed, normed).unsqueeze(-1) / normed.shape[-1]
    grad_states = grad_normed.sub_(normed.mul_(mean)).mul_(scale)
    if more is not None:
        grad_states += more
    return grad_states.to(states.dtype), grad_weight
