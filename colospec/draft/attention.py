"""Attention of training-time test (TTT), in one autograd function.

At step k the query of position t sees the step-0 keys of its own document up to t, and of each
later step only its own position: a causal block and k diagonals. The block is stock flash
attention, document by document; the diagonals are added by their scores, merged by log-sum-exp.
Flash backward recomputes probabilities from the log-sum-exp that it is given, so giving it the
merged one (and the merged output) yields the gradients of the block inside the whole softmax.

Memory is that of the inputs: no mask, no score matrix, no copy of earlier steps' keys.

Shape letters: T tokens, N query heads, M key-value heads (M divides N), D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.kernels import choice

aten = torch.ops.aten


@dataclass(frozen=True)
class Documents:
    """Borders of the documents: `borders` on the host, `cu_seqlens` [B + 1] int32 on the device."""

    borders: tuple[int, ...]
    cu_seqlens: Tensor

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in self.spans]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return list(pairwise(self.borders))


def ttt_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], documents: Documents
) -> Tensor:
    """Attend from the newest step; returns [T, N, D].

    query [T, N, D]; `keys[j]` and `values[j]` [T, M, D] are those of step j. The scale is
    1 / sqrt(D). On CUDA the type must be bfloat16 or float16; ValueError otherwise.
    """
    diagonals = [tensor for pair in zip(keys[1:], values[1:], strict=True) for tensor in pair]
    out: Tensor = _TttAttention.apply(documents, query, keys[0], values[0], *diagonals)  # type: ignore[no-untyped-call]
    return out


class _TttAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        documents: Documents,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *diagonals: Tensor,
    ) -> Tensor:
        out, lse, seeds = _flash_forward(query, key, value, documents)
        if diagonals:
            out, lse = _merge(out, lse, query, diagonals)
        ctx.documents, ctx.num_seeds = documents, len(seeds)
        ctx.save_for_backward(query, key, value, out, lse, *seeds, *diagonals)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *rest = ctx.saved_tensors
        seeds, diagonals = rest[: ctx.num_seeds], rest[ctx.num_seeds :]
        grad = grad.contiguous()
        grad_query, grad_key, grad_value = _flash_backward(
            grad, query, key, value, out, lse, seeds, ctx.documents
        )
        if not diagonals:
            return None, grad_query, grad_key, grad_value
        if choice.fused(query):
            from colospec.draft.kernels import attention as kernels

            grad_query = grad_query.contiguous()
            pairs = kernels.diagonals_backward(
                grad, grad_query, query, out, lse, diagonals[::2], diagonals[1::2]
            )
            return None, grad_query, grad_key, grad_value, *pairs.flatten(0, 1).unbind()
        total = grad_query.to(lse.dtype)
        delta = (grad.to(lse.dtype) * out).sum(-1)
        grad_diagonals: list[Tensor] = []
        for key_j, value_j in _pairs(diagonals):
            more, *pair = _diagonal_backward(grad, query, key_j, value_j, lse, delta)
            total += more
            grad_diagonals += pair
        return None, total.to(query.dtype), grad_key, grad_value, *grad_diagonals


def _pairs(diagonals: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(diagonals[::2], diagonals[1::2], strict=True))


def _grouped(states: Tensor, num_kv_heads: int) -> Tensor:
    """View [T, N, D] as [T, M, N / M, D]: query heads by the key-value head that they share."""
    num_tokens, num_heads, size = states.shape
    return states.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, size)


def _scores(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scaled scores [T, N] of each position with itself."""
    product = _grouped(query.to(dtype), key.shape[1]) * key.unsqueeze(2)
    return product.sum(-1).flatten(1) / math.sqrt(query.shape[-1])


def _merge(
    out: Tensor, lse: Tensor, query: Tensor, diagonals: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Add the diagonals to `out` [T, N, D] and `lse` [N, T]."""
    if choice.fused(query):
        from colospec.draft.kernels import attention as kernels

        out, lse = out.contiguous(), lse.contiguous()
        kernels.merge_(out, lse, query, diagonals[::2], diagonals[1::2])
        return out, lse
    pairs = _pairs(diagonals)
    scores = [_scores(query, key, lse.dtype) for key, _ in pairs]
    merged = torch.logsumexp(torch.stack([lse.T, *scores]), dim=0)
    total = out * (lse.T - merged).exp().unsqueeze(-1)
    for score, (_, value) in zip(scores, pairs, strict=True):
        share = _grouped((score - merged).exp().unsqueeze(-1), value.shape[1])
        _grouped(total, value.shape[1]).addcmul_(share, value.unsqueeze(2).to(total.dtype))
    return total.to(out.dtype), merged.T.contiguous()


def _diagonal_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one diagonal adds to the gradient of query, and those of its key and value."""
    heads, dtype = key.shape[1], lse.dtype
    share = _grouped((_scores(query, key, dtype) - lse.T).exp().unsqueeze(-1), heads)
    grad_heads = _grouped(grad.to(dtype), heads)
    grad_value = (share * grad_heads).sum(2)
    grad_share = (grad_heads * value.unsqueeze(2)).sum(-1, keepdim=True)
    grad_score = share * (grad_share - _grouped(delta.unsqueeze(-1), heads))
    grad_score /= math.sqrt(query.shape[-1])
    grad_key = (grad_score * _grouped(query, heads)).sum(2)
    grad_query = (grad_score * key.unsqueeze(2)).flatten(1, 2)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Causal attention within documents: out [T, N, D], lse [N, T], what backward wants besides."""
    if query.device.type == "cuda":
        return _cuda_forward(query, key, value, documents)
    out = torch.empty_like(query)
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=dtype)
    for span in documents.spans:
        heads, norm = aten._scaled_dot_product_flash_attention_for_cpu(
            _own(query, span, key),
            _shared(key, span, query),
            _shared(value, span, query),
            0.0,
            True,
        )
        out[slice(*span)] = heads.permute(2, 0, 1, 3).flatten(1, 2)
        lse[:, slice(*span)] = norm.flatten(0, 1)
    return out, lse, ()


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seeds: Sequence[Tensor],
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given the (merged) `out` and `lse`."""
    if query.device.type == "cuda":
        return _cuda_backward(grad, query, key, value, out, lse, seeds, documents)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for span in documents.spans:
        norm = _own(lse.T.unsqueeze(-1), span, key).squeeze(-1).contiguous()
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _own(grad, span, key),
            _own(query, span, key),
            _shared(key, span, query),
            _shared(value, span, query),
            _own(out, span, key),
            norm,
            0.0,
            True,
        )
        grads[0][slice(*span)] = parts[0].permute(2, 0, 1, 3).flatten(1, 2)
        grads[1][slice(*span)] = parts[1].sum(1).transpose(0, 1)
        grads[2][slice(*span)] = parts[2].sum(1).transpose(0, 1)
    return grads


def _own(states: Tensor, span: tuple[int, int], key: Tensor) -> Tensor:
    """View one document of query-like `states` [T, N, D] as [M, N / M, length, D]."""
    return _grouped(states[slice(*span)], key.shape[1]).permute(1, 2, 0, 3)


def _shared(states: Tensor, span: tuple[int, int], query: Tensor) -> Tensor:
    """View one document of key-like `states` [T, M, D] as [M, N / M, length, D], without a copy."""
    groups = query.shape[1] // states.shape[1]
    return states[slice(*span)].transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)


def _cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"flash attention on CUDA does not compute in {query.dtype}; set trainer.dtype=bfloat16"
        )
    if not len(query):
        return torch.empty_like(query), query.new_empty(query.shape[1], 0, dtype=torch.float32), ()
    borders, longest = documents.cu_seqlens, documents.max_length
    out, lse, state, unused, _ = aten._flash_attention_forward(
        query, key, value, borders, borders, longest, longest, 0.0, True, False
    )
    return out, lse, (state, unused)


def _cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seeds: Sequence[Tensor],
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    if not len(query):
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    borders, longest = documents.cu_seqlens, documents.max_length
    parts: tuple[Tensor, Tensor, Tensor] = aten._flash_attention_backward(
        *(grad, query, key, value, out, lse, borders, borders, longest, longest, 0.0, True),
        *seeds,
    )
    return parts
