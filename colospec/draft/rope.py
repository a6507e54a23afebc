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
from colospec.draft.public import merged_rope, partial_rotation
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
    return _frequencies(target.hf_config, target, f"{target.path}/config.json")


def rope_difference(contents: dict[str, Any], target: Target) -> str | None:
    """Say how a draft's config.json rotates otherwise than `target`, in whatever spelling; None if
    it does not, or does not tell.

    Raises ValueError for a form that we cannot reproduce.
    """
    told = {key: value for key, value in contents.items() if value is not None}
    if not {"rope_theta", "rope_scaling", "rope_parameters"} & told.keys():
        return None
    config = {
        "rope_theta": merged_rope(target.hf_config)["rope_theta"],
        "max_position_embeddings": target.hf_config.get("max_position_embeddings", 2048),
    } | told
    found, own = _frequencies(config, target, "it"), rope_frequencies(target)
    if torch.equal(found[0], own[0]) and found[1] == own[1]:
        return None
    return f"rope {_described(config)}, expected {_described(target.hf_config)}"


def _described(config: dict[str, Any]) -> dict[str, Any]:
    share = partial_rotation(config)
    return merged_rope(config) | ({"partial_rotary_factor": share} if share else {})


def _frequencies(config: dict[str, Any], target: Target, where: str) -> tuple[Tensor, float]:
    rope = merged_rope(config) | {"partial_rotary_factor": partial_rotation(config) or 1.0}
    kind = rope["rope_type"]
    if kind not in SCALED + UNSCALED:
        known = ", ".join(UNSCALED + SCALED)
        raise ValueError(f"{where} has rope_type={kind}; draft models know {known}")
    with torch.device("cpu"):
        if kind in UNSCALED:
            size = int(target.head_dim * rope["partial_rotary_factor"])
            exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
            return 1.0 / rope["rope_theta"] ** exponents, 1.0
        # Seconds to import, and a trainer needs nothing else of it.
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        llama = LlamaConfig(
            hidden_size=target.hidden_size,
            num_attention_heads=target.num_attention_heads,
            head_dim=target.head_dim,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rope_parameters=rope,
        )
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](llama, torch.device("cpu"))
        return inv_freq.to(torch.float32), float(scaling)
