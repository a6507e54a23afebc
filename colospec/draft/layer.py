"""The decoder layers of drafts, with the public tensor names of Llama's and Qwen3's.

Their parts are autograd functions that save less than autograd would: TTT keeps the activations of
every step, so each tensor saved here counts `ttt_length` times. What is elementwise runs as kernels
on CUDA.

Shape letters: T tokens, D hidden size, M key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from colospec.draft.kernels import choice
from colospec.draft.norm import RMSNorm, norm_pair
from colospec.draft.rows import linear_backward, linears, linears_rotate, norm_rotate
from colospec.target import Target

Table = tuple[Tensor, Tensor]
"""cos and sin of the tokens' positions, see `rope.Rope.table`"""
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
    """Projections and rotary embedding of states [T, input_size]; how new tokens attend is the
    caller's.

    With `head_norms` each head of queries and keys is normed before it is rotated, as in Qwen3.
    """

    def __init__(self, shape: LayerShape, *, input_size: int, head_norms: bool = False) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(input_size, width, bias=False)
        self.k_proj = nn.Linear(input_size, kv_width, bias=False)
        self.v_proj = nn.Linear(input_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.eps) if head_norms else None
        self.k_norm = RMSNorm(shape.head_dim, shape.eps) if head_norms else None

    def keys_values(self, states: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """Return keys, rotated, and values [n, M, head_dim] of states [n, input_size]."""
        key, value = self._project(states, (self.k_proj, self.v_proj), (self.k_norm,), table)
        return key, value

    def forward(self, states: Tensor, table: Table, attend: Attend) -> Tensor:
        """Attend from states [T, input_size]; returns [T, D]."""
        maps = self.q_proj, self.k_proj, self.v_proj
        out = attend(*self._project(states, maps, (self.q_norm, self.k_norm), table))
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]

    def _project(
        self,
        states: Tensor,
        maps: tuple[nn.Linear, ...],
        norms: tuple[RMSNorm | None, ...],
        table: Table,
    ) -> tuple[Tensor, ...]:
        """Return the heads [n, ., head_dim] of each map, normed and rotated but for the last."""
        weights = [linear.weight for linear in maps]
        if None in norms:
            return linears_rotate(states, weights, table, head_dim=self.head_dim)
        *parts, value = linears(states, weights)
        turned = (
            norm_rotate(part, cast(RMSNorm, norm), table)
            for part, norm in zip(parts, norms, strict=True)
        )
        return *turned, value.view(len(value), value.shape[1] // self.head_dim, self.head_dim)


class DraftLayer(nn.Module):
    """One decoder layer over the pair of token embedding and hidden state.

    It adds to the hidden state, or with `norm_before_residual` to the normed one.
    """

    def __init__(self, shape: LayerShape, *, norm_before_residual: bool = False) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.eps)
        self.self_attn = Attention(shape, input_size=2 * shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, embeds: Tensor, hidden: Tensor, table: Table, attend: Attend) -> Tensor:
        """Return the next hidden states [T, D], before any norm; `embeds` and `hidden` [T, D]."""
        pair = norm_pair(embeds, hidden, (self.input_layernorm, self.hidden_norm))
        if self.norm_before_residual:
            hidden = pair[:, embeds.shape[1] :].contiguous()
        branch = self.self_attn(pair, table, attend)
        hidden, normed = self.post_attention_layernorm.add(hidden, branch)
        return hidden + self.mlp(normed)  # type: ignore[no-any-return]


class PlainLayer(nn.Module):
    """One decoder layer over states, as in Llama, or with `head_norms` as in Qwen3."""

    def __init__(self, shape: LayerShape, *, head_norms: bool = False) -> None:
        super().__init__()
        size = shape.hidden_size
        self.input_layernorm = RMSNorm(size, shape.eps)
        self.self_attn = Attention(shape, input_size=size, head_norms=head_norms)
        self.post_attention_layernorm = RMSNorm(size, shape.eps)
        self.mlp = MLP(size, shape.intermediate_size)

    def forward(self, states: Tensor, table: Table, attend: Attend) -> Tensor:
        """Return the next states [T, D], before any norm."""
        states, normed = self.input_layernorm.add(states, None)
        branch = self.self_attn(normed, table, attend)
        states, normed = self.post_attention_layernorm.add(states, branch)
        return states + self.mlp(normed)  # type: ignore[no-any-return]


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
