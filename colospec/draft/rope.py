"""Rotary position embedding with the target's frequencies, in every form config.json has them.

transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`. Tables
are float32: positions of tens of thousands do not survive bfloat16.

Shape letters: T tokens, N heads, R rotated dimensions of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colospec.draft.kernels import choice
from colospec.target import Target

SCALED = ("linear", "dynamic", "llama3", "yarn")
# Positions of plain text are equal on all three axes of M-RoPE, which makes it the unscaled form.
UNSCALED = ("default", "mrope")


class Rope:
    """Cosine and sine tables for positions.

    Not a module: `Module.to(torch.bfloat16)` would round the frequencies of a buffer.
    """

    def __init__(self, target: Target) -> None:
        self.inv_freq, self.scaling = rope_frequencies(target)

    def table(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [T, 1, R / 2] float32, for `position_ids` [T]."""
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids[:, None, None].to(torch.float32) * self.inv_freq
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(states: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R dimensions of `states` [T, N, head_dim], halves paired as in Llama."""
    cos, sin = table
    half = cos.shape[-1]
    first, second, rest = states.tensor_split([half, 2 * half], dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(states.dtype) for part in turned), rest], dim=-1)


def rotate_(states: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Return `rotate(states, table)` of contiguous states that nobody else reads: on a GPU the
    result is written over them."""
    if not choice.fused(states):
        return rotate(states, table)
    from colospec.draft.kernels.rope import rotate_into

    return rotate_into(states, states, *table)


def rotate_back(grad: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Return the gradient of the states, given the gradient of the rotated ones."""
    cos, sin = table
    if not choice.fused(grad):
        return rotate(grad, (cos, -sin))
    from colospec.draft.kernels.rope import rotate_into

    return rotate_into(torch.empty_like(grad), grad, cos, sin, back=True)


def rope_frequencies(target: Target) -> tuple[Tensor, float]:
    """Return the inverse frequencies [R / 2] float32 and the factor on cos and sin.

    `dynamic` is taken at max_position_embeddings, where it equals the unscaled form.
    Raises ValueError for a form that we cannot reproduce.
    """
    rope = _parameters(target)
    kind = rope["rope_type"]
    if kind not in SCALED + UNSCALED:
        raise ValueError(
            f"{target.path}/config.json has rope_type={kind}; "
            f"draft models know {', '.join(UNSCALED + SCALED)}"
        )
    with torch.device("cpu"):
        if kind in UNSCALED:
            size = int(target.head_dim * rope.get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
            return 1.0 / rope["rope_theta"] ** exponents, 1.0
        # Seconds to import, and a trainer needs nothing else of it.
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig(
            hidden_size=target.hidden_size,
            num_attention_heads=target.num_attention_heads,
            head_dim=target.head_dim,
            max_position_embeddings=target.hf_config.get("max_position_embeddings", 2048),
            rope_parameters=rope,
        )
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return inv_freq.to(torch.float32), float(scaling)


def _parameters(target: Target) -> dict[str, Any]:
    """Merge the old and new spellings into one flat dict with rope_type and rope_theta."""
    config = target.hf_config
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    # Targets that mix layer types keep one dict per type; the draft attends to everything.
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or target.rope_theta
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return {**rope, "rope_type": kind, "rope_theta": theta, "partial_rotary_factor": partial}
