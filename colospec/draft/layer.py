"""The draft's decoder layer, with the public tensor names of EAGLE-3 checkpoints.

RMSNorm and MLP are autograd functions that save less than autograd would: TTT keeps the activations
of every step, so each tensor saved here counts `ttt_length` times.

Shape letters: T tokens, H and D hidden size of target and draft, I MLP width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from colospec.draft.rope import rotate

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


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32; saves its input and one number per row."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(states, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); saves x, gate(x) and up(x), no product of them."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        product: Tensor = _SwiGLU.apply(  # type: ignore[no-untyped-call]
            self.gate_proj(states), self.up_proj(states), self.down_proj.weight
        )
        return product


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
        query, key, value = (
            proj(states).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(query, table), rotate(key, table), value)
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]


class DraftLayer(nn.Module):
    """One decoder layer over the pair of token embedding and hidden state."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(
        self, embeds: Tensor, hidden: Tensor, table: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """Return the next hidden states [T, D], before any norm; `embeds` and `hidden` [T, D]."""
        pair = torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(pair, table, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class KVCache:
    """Rotated keys and values of one sequence, for decoding: grows by appending, shrinks by
    `truncate`."""

    def __init__(self) -> None:
        self.length = 0
        self._states: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add n tokens [n, M, head_dim] and return views of all, [length, M, head_dim]."""
        end = self.length + len(key)
        if self._states is None or end > self._states.shape[1]:
            grown = key.new_empty(2, max(64, 2 * end), *key.shape[1:])
            if self._states is not None:
                grown[:, : self.length] = self._states[:, : self.length]
            self._states = grown
        self._states[0, self.length : end] = key
        self._states[1, self.length : end] = value
        self.length = end
        return self._states[0, :end], self._states[1, :end]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append the new tokens and attend causally over everything cached."""
        keys, values = self.append(key, value)
        mask = torch.ones(len(query), self.length, dtype=torch.bool, device=query.device)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask.tril(self.length - len(query)),
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        scale = torch.rsqrt(torch.linalg.vecdot(wide, wide).unsqueeze(-1) / wide.shape[-1] + eps)
        ctx.save_for_backward(states, weight, scale)
        return (wide * scale).mul_(weight).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        normed = states * scale
        grad_weight = torch.einsum("td,td->d", grad.to(scale.dtype), normed).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad_normed = grad * weight.to(scale.dtype)
        mean = torch.linalg.vecdot(grad_normed, normed).unsqueeze(-1) / normed.shape[-1]
        grad_states = grad_normed.sub_(normed.mul_(mean)).mul_(scale)
        return grad_states.to(states.dtype), grad_weight, None


class _SwiGLU(Function):
    """silu(gate) * up @ down^T."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, down)
        return F.linear(F.silu(gate).mul_(up), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = ctx.saved_tensors
        active = F.silu(gate)
        grad_down = grad.T @ (active * up)
        grad_product = grad @ down
        grad_up = active.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        return grad_gate, grad_up, grad_down
