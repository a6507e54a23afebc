"""A plain Llama layer, what follows the first layer of EAGLE-3 in deeper drafts.

Shape letters: n tokens, H hidden size, M key-value heads, D head size.
"""

from __future__ import annotations

from torch import Tensor, nn

from colospec.draft.layer import MLP, Attend, LayerShape, RMSNorm
from colospec.draft.rope import rotate


class PlainAttention(nn.Module):
    """Projections and rotary embedding; how new tokens attend is the caller's."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        size, width = shape.hidden_size, shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(size, width, bias=False)
        self.k_proj = nn.Linear(size, kv_width, bias=False)
        self.v_proj = nn.Linear(size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, size, bias=False)

    def forward(self, states: Tensor, table: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Attend from states [n, H]."""
        query, key, value = (
            self._heads(project(states)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(query, table), rotate(key, table), value)
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(len(states), states.shape[1] // self.head_dim, self.head_dim)


class PlainLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.self_attn = PlainAttention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, states: Tensor, table: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Return the next states [n, H], before any norm."""
        states = states + self.self_attn(self.input_layernorm(states), table, attend)
        return states + self.mlp(self.post_attention_layernorm(states))  # type: ignore[no-any-return]
