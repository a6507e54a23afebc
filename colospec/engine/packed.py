"""Attention over packed documents, for any transformers model that looks its attention up by name.

transformers asks `ALL_ATTENTION_FUNCTIONS` for the function that its config names. Ours is called
`colospec_packed`: it attends causally inside each document and never builds a [T, T] mask, so work
and memory between documents are not spent. On CUDA it is one variable-length flash kernel; on a CPU
(and in float32) it is stock attention, one document after the other.

The borders travel beside the model, because not every model hands unknown arguments down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "colospec_packed"
MAX_FLASH_HEAD_DIM = 256

# Arguments that models pass to their attention and that do not change its result here.
_HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that the packed one does not do."""


@dataclass
class Borders:
    """Where documents begin and end: lengths on the host, cu_seqlens [B + 1] int32 on the device.

    `num_calls` counts how often attention has run on this batch.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    num_calls: int = 0


_borders: ContextVar[Borders] = ContextVar("borders")


@contextmanager
def documents(borders: Borders) -> Iterator[None]:
    """Make `borders` those of the batch that the model runs on inside this block."""
    token = _borders.set(borders)
    try:
        yield
    finally:
        _borders.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend inside documents; query [1, N, T, d], key and value [1, N_kv, T, d] -> [1, T, N, d].

    Raises UnsupportedAttentionError for a mask, dropout, attention sinks, score caps, biases, or
    anything else that would change the result.
    """
    extra = {name for name, value in kwargs.items() if value is not None} - _HARMLESS
    if attention_mask is not None:
        extra.add("attention_mask")
    if dropout:
        extra.add("dropout")
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        extra.add("attention that is not causal")
    if extra:
        raise UnsupportedAttentionError(f"{type(module).__name__} uses {', '.join(sorted(extra))}")
    borders = _borders.get()
    borders.num_calls += 1
    if _flash_serves(query, value):
        out = _flash(query, key, value, borders, scaling, sliding_window)
    else:
        out = _one_by_one(query, key, value, borders, scaling, sliding_window)
    return out, None


def _flash_serves(query: Tensor, value: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= MAX_FLASH_HEAD_DIM
    )


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Borders,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    longest = max(borders.lengths)
    # transformers counts the token itself in its window, flash attention does not.
    left = None if sliding_window is None or sliding_window >= longest else sliding_window - 1
    # The same kernel as that of varlen_attn, whose arguments differ between releases.
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(state[0].transpose(0, 1).contiguous() for state in (query, key, value)),
        *(borders.cu_seqlens, borders.cu_seqlens, longest, longest, 0.0, True, False),
        scale=scaling,
        window_size_left=left,
        window_size_right=None if left is None else 0,
    )[0]
    return out[None]


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Borders,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    outs = []
    parts = (torch.split(part, list(borders.lengths), dim=2) for part in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            mask = _window_mask(q.shape[2], sliding_window, q.device)
        outs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return [length, length] bool: each token sees itself and the window - 1 tokens before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, attend)
