"""The diagonals of TTT attention: merged into flash attention's result, and their gradients.

One program is a few tokens and one key-value head with the query heads that share it. Keys and
values of the steps come as tuples of tensors: a kernel is compiled for each number of steps.

Shape letters: T tokens, N query heads, M key-value heads (M divides N), D head size, K diagonals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
NUM_WARPS = 4


def merge_(
    out: Tensor, lse: Tensor, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Add K diagonals to `out` [T, N, D] and `lse` [N, T] float32, in place.

    query [T, N, D]; keys[j] and values[j] [T, M, D]. `out` and `lse` are contiguous.
    """
    _merge_kernel[_grid(query, keys[0])](
        query.contiguous(), out, lse, _dense(keys), _dense(values), len(query),
        **_shape(query, keys),
    )  # fmt: skip


def diagonals_backward(
    grad: Tensor,
    grad_query: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:
    """Return the gradients of K keys and values, [K, 2, T, M, D], and add to `grad_query`.

    grad, grad_query, query and out are [T, N, D], lse [N, T] float32, the last two with the
    diagonals merged; `grad_query` and those two are contiguous.
    """
    grads = query.new_empty(len(keys), 2, *keys[0].shape)
    _backward_kernel[_grid(query, keys[0])](
        grad.contiguous(), grad_query, query.contiguous(), out, lse, _dense(keys), _dense(values),
        grads, len(query), **_shape(query, keys),
    )  # fmt: skip
    return grads


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _shape(query: Tensor, keys: Sequence[Tensor]) -> dict[str, int | float]:
    _, num_heads, head_dim = query.shape
    num_kv_heads = keys[0].shape[1]
    group = num_heads // num_kv_heads
    return {
        "scale": 1 / math.sqrt(head_dim),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "group": group,
        "count": len(keys),
        "tokens": _tokens(query, keys[0]),
        "heads": triton.next_power_of_2(group),
        "block": triton.next_power_of_2(head_dim),
        "num_warps": NUM_WARPS,
    }


def _tokens(query: Tensor, key: Tensor) -> int:
    """Return how many tokens one program takes."""
    group = triton.next_power_of_2(query.shape[1] // key.shape[1])
    size: int = max(1, ELEMENTS // (group * triton.next_power_of_2(query.shape[2])))
    return size


def _grid(query: Tensor, key: Tensor) -> tuple[int, int]:
    return triton.cdiv(len(query), _tokens(query, key)), key.shape[1]


@triton.jit
def _places(
    lse: tl.tensor, num_tokens: tl.tensor, num_heads: tl.constexpr, num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr, group: tl.constexpr, tokens: tl.constexpr, heads: tl.constexpr,
    block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Return where a program's numbers are, each with which of them exist: offsets of queries
    [tokens, heads, block] and keys [tokens, 1, block], and pointers into lse [tokens, heads]."""
    kv_head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * tokens + tl.arange(0, tokens)
    head = tl.arange(0, heads)
    column = tl.arange(0, block)[None, None, :]
    own = (token[:, None] < num_tokens) & (head[None, :] < group)
    inside = own[:, :, None] & (column < head_dim)
    shared = (token[:, None, None] < num_tokens) & (column < head_dim)
    query_head = kv_head * group + head
    at = (token[:, None] * num_heads + query_head[None, :])[:, :, None] * head_dim + column
    kv_at = (token * num_kv_heads + kv_head)[:, None, None] * head_dim + column
    lse_at = lse + query_head[None, :].to(tl.int64) * num_tokens + token[:, None]
    return at, inside, kv_at, shared, lse_at, own


@triton.jit(do_not_specialize=["num_tokens"])
def _merge_kernel(
    query: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    num_tokens: tl.tensor,
    scale: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    group: tl.constexpr,
    count: tl.constexpr,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at, inside, kv_at, shared, lse_at, own = _places(
        lse, num_tokens, num_heads, num_kv_heads, head_dim, group, tokens, heads, block
    )

    q = tl.load(query + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    top = tl.load(lse_at, mask=own, other=0.0)
    mass = tl.full([tokens, heads], 1.0, tl.float32)
    for j in tl.static_range(count):
        key = tl.load(keys[j] + kv_at, mask=shared, other=0.0).to(tl.float32)
        value = tl.load(values[j] + kv_at, mask=shared, other=0.0).to(tl.float32)
        score = tl.sum(q * key, 2) * scale
        higher = tl.maximum(top, score)
        fade = tl.exp(top - higher)
        share = tl.exp(score - higher)
        total = total * fade[:, :, None] + share[:, :, None] * value
        mass = mass * fade + share
        top = higher
    # Several threads may hold an element; all have read it before one of them writes.
    tl.debug_barrier()
    total = total / mass[:, :, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
    tl.store(lse_at, top + tl.log(mass), mask=own)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grads: tl.tensor,
    grad_query: tl.tensor,
    query: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    grad_pairs: tl.tensor,
    num_tokens: tl.tensor,
    scale: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    group: tl.constexpr,
    count: tl.constexpr,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at, inside, kv_at, shared, lse_at, own = _places(
        lse, num_tokens, num_heads, num_kv_heads, head_dim, group, tokens, heads, block
    )

    q = tl.load(query + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(grad * tl.load(out + at, mask=inside, other=0.0).to(tl.float32), 2)
    norm = tl.load(lse_at, mask=own, other=0.0)
    total = tl.load(grad_query + at, mask=inside, other=0.0).to(tl.float32)
    kind = grad_pairs.dtype.element_ty
    for j in tl.static_range(count):
        key = tl.load(keys[j] + kv_at, mask=shared, other=0.0).to(tl.float32)
        value = tl.load(values[j] + kv_at, mask=shared, other=0.0).to(tl.float32)
        share = tl.exp(tl.sum(q * key, 2) * scale - norm)
        grad_score = share * (tl.sum(grad * value, 2) - delta) * scale
        total += grad_score[:, :, None] * key
        grad_key = tl.sum(grad_score[:, :, None] * q, 1, keep_dims=True)
        grad_value = tl.sum(share[:, :, None] * grad, 1, keep_dims=True)
        first = (num_tokens.to(tl.int64) * (2 * j)) * (num_kv_heads * head_dim)
        second = (num_tokens.to(tl.int64) * (2 * j + 1)) * (num_kv_heads * head_dim)
        tl.store(grad_pairs + first + kv_at, grad_key.to(kind), mask=shared)
        tl.store(grad_pairs + second + kv_at, grad_value.to(kind), mask=shared)
    # Several threads may hold an element; all have read it before one of them writes.
    tl.debug_barrier()
    tl.store(grad_query + at, total.to(grad_query.dtype.element_ty), mask=inside)
