"""The draft's decoder layer, with the public tensor names of EAGLE-3 checkpoints.

Its parts are autograd functions that save less than autograd would: TTT keeps the activations of
every step, so each tensor saved here counts `ttt_length` times. What is elementwise runs as kernels
on CUDA.

Shape letters: T tokens, D hidden size, I MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from colospec.draft.kernels import choice
from colospec.draft.rope import rotate_, rotate_back
from colospec.target import Target

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [T, N, head_dim], key and value [T, M, head_dim] of the new tokens) -> [T, N, head_dim]"""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the layer; `head_dim` need not be hidden_size / num_heads."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float

    @classmethod
    def of(cls, target: Target, intermediate_size: int | None) -> LayerShape:
        """Return the sizes of the target's own layers; None keeps its MLP's width too."""
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=intermediate_size or target.intermediate_size,
            num_heads=target.num_attention_heads,
            num_kv_heads=target.num_key_value_heads,
            head_dim=target.head_dim,
            eps=float(target.hf_config.get("rms_norm_eps", 1e-6)),
        )


def init_linears(model: nn.Module) -> None:
    """Draw the weights of all linear layers of a fresh draft, normal with deviation 0.02; biases
    start from 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), x [T, D]; saves x, gate(x) and up(x), no product."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = _MLP.apply(  # type: ignore[no-untyped-call]
            states, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        )
        return out


class Attention(nn.Module):
    """Projections and rotary embedding; how new tokens attend is the caller's."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        kv_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(2 * shape.hidden_size, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(2 * shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias=False)

    def forward(self, states: Tensor, table: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        out = attend(*_Project.apply(states, *weights, *table, self.head_dim))  # type: ignore[no-untyped-call]
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]


class DraftLayer(nn.Module):
    """One decoder layer over the pair of token embedding and hidden state.

    It adds to the hidden state, or with `norm_before_residual` to the normed one.
    """

    def __init__(self, shape: LayerShape, *, norm_before_residual: bool = False) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(
        self, embeds: Tensor, hidden: Tensor, table: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """Return the next hidden states [T, D], before any norm; `embeds` and `hidden` [T, D]."""
        left, right = self.input_layernorm, self.hidden_norm
        pair = _NormPair.apply(embeds, hidden, left.weight, right.weight, left.eps)  # type: ignore[no-untyped-call]
        if self.norm_before_residual:
            hidden = pair[:, embeds.shape[1] :].contiguous()
        branch = self.self_attn(pair, table, attend)
        hidden, normed = self.post_attention_layernorm.add(hidden, branch)
        return hidden + self.mlp(normed)  # type: ignore[no-any-return]


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


class _Project(Function):
    """Query [T, N, head_dim], key and value [T, M, head_dim], the first two rotated.

    Saves the states [T, I] alone, nothing from before the rotation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        head_dim: int,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(states, query, key, value, cos, sin)
        parts = [
            F.linear(states, weight).view(len(states), len(weight) // head_dim, head_dim)
            for weight in (query, key, value)
        ]
        return *(rotate_(part, (cos, sin)) for part in parts[:2]), parts[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, *weights, cos, sin = ctx.saved_tensors
        turned = [rotate_back(grad.contiguous(), (cos, sin)) for grad in grads[:2]]
        parts = [grad.flatten(1) for grad in (*turned, grads[2])]
        grad_states, grad_weights = linear_backward(parts, states, weights)
        return grad_states, *grad_weights, None, None, None


class _MLP(Function):
    """silu(x gate^T) * (x up^T) @ down^T."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        left, right = F.linear(states, gate), F.linear(states, up)
        ctx.save_for_backward(states, left, right, gate, up, down)
        return F.linear(_swiglu(left, right), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        states, left, right, gate, up, down = ctx.saved_tensors
        product, *parts = _swiglu_backward(grad @ down, left, right)
        grad_down = grad.T @ product
        del product
        grad_states, grad_weights = linear_backward(parts, states, (gate, up))
        return grad_states, *grad_weights, grad_down


def linear_backward(
    grads: Sequence[Tensor], states: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of `states`, which several linear maps read, and of their weights."""
    total = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.addmm_(grad, weight)
    return total, [grad.T @ states for grad in grads]


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if choice.fused(gate):
        from colospec.draft.kernels import swiglu as kernels

        return kernels.swiglu(gate, up)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the product again and the gradients of gate and up; `grad` is given up."""
    if choice.fused(gate):
        from colospec.draft.kernels import swiglu as kernels

        return kernels.swiglu_backward(grad, gate, up)
    active = F.silu(gate)
    product = active * up
    grad_up = active.mul_(grad)
    grad_gate = torch.ops.aten.silu_backward(grad.mul_(up), gate)
    return product, grad_gate, grad_up
