"""Attention of blocks: each sees the context before its anchor, and itself.

Full layers let the slots of a block see each other in both directions. Sliding layers are causal
inside the block too, and see no further back than `window` tokens, the own one counted.

On a GPU, kernels keep no scores at all. Elsewhere, and in float64, blocks of one document are taken
some at a time; their scores live for that time alone and are computed again in backward. Either
way, memory is that of the inputs.

Shape letters: N blocks of b slots, C context rows, Q query heads, M key-value heads (M divides Q),
D head size; in a chunk G blocks of one document, L context rows, R = Q / M * b queries for each
block and key-value head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.anchors import Blocks
from colospec.draft.kernels import choice

MAX_SCORES = {"cpu": 2**22, "cuda": 2**27}


def block_attention(
    query: Tensor,
    context: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
    blocks: Blocks,
    *,
    window: int | None,
) -> Tensor:
    """Attend from all slots; returns [N * b, Q, D].

    query [N * b, Q, D]; context: keys and values [C, M, D]; block: keys and values [N * b, M, D] of
    the slots. `window` None is a full layer. The scale is 1 / sqrt(D).
    """
    function = _Fused if choice.fused(query) else _BlockAttention
    out: Tensor = function.apply(query, *context, *block, blocks, window)  # type: ignore[no-untyped-call]
    return out


class _Fused(Function):
    """The kernels: nothing but the inputs, the result and one number for each query is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        blocks: Blocks,
        window: int | None,
    ) -> Tensor:
        from colospec.draft.kernels import block_attention as kernels

        reach = kernels.Reach(
            blocks.starts, blocks.starts + blocks.offsets, blocks.size, window or 0
        )
        parts = [part.contiguous() for part in (query, key, value, own_key, own_value)]
        query, key, value, own_key, own_value = parts
        out, norm = kernels.attend(query, (key, value), (own_key, own_value), reach)
        ctx.save_for_backward(*parts, out, norm)
        ctx.reach = reach
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from colospec.draft.kernels.block_attention_backward import attend_backward

        query, key, value, own_key, own_value, out, norm = ctx.saved_tensors
        grads = attend_backward(
            grad.contiguous(), query, (key, value), (own_key, own_value), out, norm, ctx.reach
        )
        return *grads, None, None


@dataclass(frozen=True)
class _Chunk:
    """Which slots, which context rows, and what is hidden: [G, b, L + b] bool."""

    slots: slice
    rows: slice
    num_blocks: int
    hidden: Tensor


class _BlockAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        blocks: Blocks,
        window: int | None,
    ) -> Tensor:
        out = torch.empty_like(query)
        heads = key.shape[1]
        for chunk in _chunks(blocks, window, query.shape[1]):
            asked = _asked(query[chunk.slots], chunk, heads)
            keys, values = key[chunk.rows].transpose(0, 1), value[chunk.rows].transpose(0, 1)
            own = _own(own_key[chunk.slots], chunk), _own(own_value[chunk.slots], chunk)
            probs = _probabilities(asked, keys, own[0], chunk).to(query.dtype)
            left, right = torch.split(probs, [keys.shape[1], blocks.size], dim=-1)
            total = _times(left, values) + right @ own[1]
            out[chunk.slots] = _answered(total, blocks.size)
        ctx.save_for_backward(query, key, value, own_key, own_value, out)
        ctx.blocks, ctx.window = blocks, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, out = ctx.saved_tensors
        blocks, heads = ctx.blocks, key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(part, dtype=wide) for part in (key, value))
        grad_own_key, grad_own_value = torch.empty_like(own_key), torch.empty_like(own_value)
        for chunk in _chunks(blocks, ctx.window, query.shape[1]):
            asked, told, said = (
                _asked(part[chunk.slots], chunk, heads) for part in (query, grad, out)
            )
            keys, values = key[chunk.rows].transpose(0, 1), value[chunk.rows].transpose(0, 1)
            own = _own(own_key[chunk.slots], chunk), _own(own_value[chunk.slots], chunk)
            probs = _probabilities(asked, keys, own[0], chunk)
            grads = torch.cat(
                [_times(told, values.transpose(1, 2)), told @ own[1].transpose(2, 3)], dim=-1
            ).to(wide)
            delta = (told.to(wide) * said).sum(-1, keepdim=True)
            grads.sub_(delta).mul_(probs).mul_(1 / math.sqrt(query.shape[-1]))
            sizes = [keys.shape[1], blocks.size]
            scores, own_scores = torch.split(grads.to(query.dtype), sizes, dim=-1)
            left, right = torch.split(probs.to(query.dtype), sizes, dim=-1)
            total = _times(scores, keys) + own_scores @ own[0]
            grad_query[chunk.slots] = _answered(total, blocks.size)
            for whole, weights, part in (
                (grad_key, scores, asked), (grad_value, left, told),
            ):  # fmt: skip
                added = weights.flatten(1, 2).transpose(1, 2) @ part.flatten(1, 2)
                whole[chunk.rows] += added.transpose(0, 1)
            for mine, weights, part in (
                (grad_own_key, own_scores, asked), (grad_own_value, right, told),
            ):  # fmt: skip
                added = weights.transpose(2, 3) @ part
                mine[chunk.slots] = added.permute(1, 2, 0, 3).flatten(0, 1)
        return (
            grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype),
            grad_own_key, grad_own_value, None, None,
        )  # fmt: skip


def _chunks(blocks: Blocks, window: int | None, num_heads: int) -> Iterator[_Chunk]:
    """Split the blocks of each document so that the scores of a chunk are bounded."""
    device, size = blocks.offsets.device, blocks.size
    steps = torch.arange(size, device=device)
    for span in blocks.spans:
        width = num_heads * size * (blocks.lengths[span.last - 1] + size)
        number = max(1, MAX_SCORES[device.type] // width)
        for first in range(span.first, span.last, number):
            last = min(first + number, span.last)
            # Anchors ascend: the last block sees most, the first one looks back furthest.
            end = blocks.lengths[last - 1]
            begin = 0 if window is None else max(0, blocks.lengths[first] - window + 1)
            anchors = blocks.offsets[first:last, None, None]
            asking = anchors + steps[:, None]
            rows = torch.arange(begin, end, device=device)
            hidden = (rows >= anchors).expand(-1, size, -1)
            own = anchors + steps
            own_hidden = torch.zeros_like(own > asking)
            if window is not None:
                hidden = hidden | (rows <= asking - window)
                own_hidden = (own > asking) | (own <= asking - window)
            yield _Chunk(
                slots=slice(first * size, last * size),
                rows=slice(span.start + begin, span.start + end),
                num_blocks=last - first,
                hidden=torch.cat([hidden, own_hidden], dim=-1),
            )


def _asked(states: Tensor, chunk: _Chunk, heads: int) -> Tensor:
    """Turn query-like [G * b, Q, D] into [M, G, R, D]."""
    size = states.shape[-1]
    parts = states.reshape(chunk.num_blocks, -1, heads, states.shape[1] // heads, size)
    return parts.permute(2, 0, 3, 1, 4).flatten(2, 3)


def _answered(states: Tensor, block_size: int) -> Tensor:
    """Turn [M, G, R, D] into [G * b, Q, D]."""
    heads, number, rows, size = states.shape
    parts = states.view(heads, number, rows // block_size, block_size, size)
    return parts.permute(1, 3, 0, 2, 4).reshape(number * block_size, -1, size)


def _own(states: Tensor, chunk: _Chunk) -> Tensor:
    """Turn key-like [G * b, M, D] into [M, G, b, D]."""
    parts = states.view(chunk.num_blocks, -1, *states.shape[1:])
    return parts.permute(2, 0, 1, 3)


def _times(states: Tensor, matrix: Tensor) -> Tensor:
    """Multiply [M, G, R, X] by [M, X, Y], which all blocks share."""
    heads, number, rows, _ = states.shape
    return (states.flatten(1, 2) @ matrix).view(heads, number, rows, matrix.shape[2])


def _probabilities(asked: Tensor, keys: Tensor, own: Tensor, chunk: _Chunk) -> Tensor:
    """Return the probabilities [M, G, R, L + b], float32 or wider."""
    scores = torch.cat([_times(asked, keys.transpose(1, 2)), asked @ own.transpose(2, 3)], dim=-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores *= 1 / math.sqrt(asked.shape[-1])
    hidden = chunk.hidden.repeat(1, asked.shape[2] // chunk.hidden.shape[1], 1)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1)
