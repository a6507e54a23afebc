"""Gradients of block attention, deterministic: every element is written by one program.

Probabilities are computed again from the sums that the forward pass kept. Three kernels: queries,
tile by tile as in the forward pass; keys and values of the context, a tile of rows with all blocks
behind it, or a share of them; keys and values of the slots themselves.

Shape letters: N blocks of b slots, C context rows, Q query heads, M key-value heads (M divides Q),
D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colospec.draft.kernels.block_attention import (
    Reach,
    Tile,
    fit,
    grid,
    keys_at,
    load_pair,
    load_rows,
    own_visible,
    rows_of,
    run_of,
    seen_by,
    settings,
    tile_of,
)

QUERIES = Tile(rows=128, keys=64, num_warps=8, num_stages=3)
CONTEXT = Tile(rows=64, keys=128, num_warps=8, num_stages=3)
OWN = Tile(rows=64, keys=16, num_warps=4, num_stages=1)
# Blocks that a program looks at together, to find those that see its context rows.
LANES = 1024
# Programs that fill a large GPU. The first rows of a document have work from all its blocks, and
# where there is little context, they share it among several programs.
PROGRAMS = 512


def attend_backward(
    grad: Tensor,
    query: Tensor,
    context: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
    out: Tensor,
    norm: Tensor,
    reach: Reach,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, context keys and values, and the blocks' keys and values.

    Arguments and results of `attend`; `grad` [N * b, Q, D] is contiguous too.
    """
    grad_query, delta = torch.empty_like(query), torch.empty_like(norm)
    own_grads = torch.empty_like(block[0]), torch.empty_like(block[1])
    if not len(query):
        return grad_query, torch.zeros_like(context[0]), torch.zeros_like(context[1]), *own_grads
    key, tables, count = context[0], (reach.starts, reach.ends), len(reach.ends)
    tile = fit(QUERIES, query)
    _query_kernel[grid(query, key, reach, tile)](
        query, *context, *block, *tables, out, grad, norm, delta, grad_query, count,
        reach.window, keys=tile.keys, **settings(query, key, reach, tile),
    )  # fmt: skip
    tile = fit(OWN, query)
    _own_kernel[grid(query, key, reach, tile)](
        query, *block, grad, norm, delta, *own_grads, count, reach.window,
        **settings(query, key, reach, tile),
    )  # fmt: skip
    tile = fit(CONTEXT, query)
    tiles, heads = triton.cdiv(len(key), tile.keys), key.shape[1]
    shares = min(16, triton.cdiv(PROGRAMS, tiles * heads))
    parts = key.new_empty(2, shares, *key.shape, dtype=torch.float32)
    _context_kernel[tiles, heads, shares](
        query, *context, *tables, grad, norm, delta, *parts, count, len(key),
        reach.window, lanes=LANES, keys=tile.keys, **settings(query, key, reach, tile),
    )  # fmt: skip
    grad_key, grad_value = parts.sum(1).to(key.dtype)
    return grad_query, grad_key, grad_value, *own_grads


@triton.jit
def _weigh(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad: tl.tensor, norm: tl.tensor, delta: tl.tensor,
    visible: tl.tensor, masked: tl.constexpr, scale: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the gradient of the unscaled scores [rows, keys]."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    share = tl.exp2(score * scale - norm[:, None])
    if masked:
        share = tl.where(visible, share, 0.0)
    slope = tl.dot(grad, tl.trans(v), input_precision="ieee")
    return share * (slope - delta[:, None])


@triton.jit
def _weigh_keys(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad: tl.tensor, norm: tl.tensor, delta: tl.tensor,
    visible: tl.tensor, masked: tl.constexpr, scale: tl.constexpr,
    grad_key: tl.tensor, grad_value: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Add what a tile of rows gives to keys and values; everything lies [keys, rows]."""
    score = tl.dot(k, tl.trans(q), input_precision="ieee")
    share = tl.exp2(score * scale - norm[None, :])
    if masked:
        share = tl.where(visible, share, 0.0)
    grad_value = tl.dot(share.to(grad.dtype), grad, grad_value, input_precision="ieee")
    slope = tl.dot(v, tl.trans(grad), input_precision="ieee")
    slope = share * (slope - delta[None, :])
    grad_key = tl.dot(slope.to(q.dtype), q, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit
def _store_pair(
    grad_key: tl.tensor, grad_value: tl.tensor, at: tl.tensor, exists: tl.tensor,
    total_key: tl.tensor, total_value: tl.tensor, scale: tl.constexpr, head_dim: tl.constexpr,
    width: tl.constexpr,
) -> None:  # fmt: skip
    """Store the sums of a tile of keys, and scale those of the keys.

    The logarithm is to base 2 for the exponentials alone.
    """
    total_key *= scale * 0.6931471805599453
    column = tl.arange(0, width)[None, :]
    mine = exists[:, None] & (column < head_dim)
    kind = grad_key.dtype.element_ty
    tl.store(grad_key + at[:, None] + column, total_key.to(kind), mask=mine)
    tl.store(grad_value + at[:, None] + column, total_value.to(kind), mask=mine)


@triton.jit(do_not_specialize=["num_blocks", "window"])
def _query_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    own_key: tl.tensor,
    own_value: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    grads: tl.tensor,
    norms: tl.tensor,
    deltas: tl.tensor,
    grad_query: tl.tensor,
    num_blocks: tl.tensor,
    window: tl.tensor,
    scale: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    sliding: tl.constexpr,
    slots: tl.constexpr,
    keys: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
) -> None:
    kv_head = tl.program_id(1)
    first, limit, own_first, own_limit = tile_of(tl.program_id(0), num_blocks, size, slots)
    slot, row, inside = rows_of(first, limit, kv_head, slots, heads, group, num_heads)
    q, grad = load_pair(query, grads, row * head_dim, inside, True, head_dim, width)
    said = load_rows(out, row * head_dim, inside, True, head_dim, width)
    delta = tl.sum(grad.to(tl.float32) * said.to(tl.float32), 1)
    tl.store(deltas + row, delta, mask=inside)
    norm = tl.load(norms + row, mask=inside, other=0.0)
    low, high = seen_by(starts, ends, slot, inside, size, window, sliding)
    start, end, count, before, whole = run_of(
        starts, ends, first, limit, size, window, sliding, keys
    )
    total = tl.zeros([slots * heads, width], tl.float32)
    lane = tl.arange(0, keys)

    for tile in range(before, before + whole):
        place = start + tile * keys + lane
        at = keys_at(place, kv_head, num_kv_heads, head_dim)
        k, v = load_pair(key, value, at, place < end, False, head_dim, width)
        slope = _weigh(q, k, v, grad, norm, delta, inside, False, scale)
        total = tl.dot(slope.to(k.dtype), k, total, input_precision="ieee")
    for number in range(0, count - whole):
        tile = tl.where(number < before, number, number + whole)
        place = start + tile * keys + lane
        at = keys_at(place, kv_head, num_kv_heads, head_dim)
        k, v = load_pair(key, value, at, place < end, True, head_dim, width)
        visible = (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])
        slope = _weigh(q, k, v, grad, norm, delta, visible, True, scale)
        total = tl.dot(slope.to(k.dtype), k, total, input_precision="ieee")
    own_keys: tl.constexpr = slots if slots > 16 else 16
    for own in range(own_first, own_limit, own_keys):
        other = own + tl.arange(0, own_keys)
        exists = other < own_limit
        at = keys_at(other, kv_head, num_kv_heads, head_dim)
        k, v = load_pair(own_key, own_value, at, exists, True, head_dim, width)
        visible = (
            own_visible(slot[:, None], other[None, :], size, window, sliding) & exists[None, :]
        )
        slope = _weigh(q, k, v, grad, norm, delta, visible, True, scale)
        total = tl.dot(slope.to(k.dtype), k, total, input_precision="ieee")

    # The logarithm is to base 2 for the exponentials alone.
    total *= scale * 0.6931471805599453
    column = tl.arange(0, width)[None, :]
    mine = inside[:, None] & (column < head_dim)
    place = grad_query + row[:, None] * head_dim + column
    tl.store(place, total.to(grad_query.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=["num_blocks", "num_context", "window"])
def _context_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    grads: tl.tensor,
    norms: tl.tensor,
    deltas: tl.tensor,
    grad_key: tl.tensor,
    grad_value: tl.tensor,
    num_blocks: tl.tensor,
    num_context: tl.tensor,
    window: tl.tensor,
    lanes: tl.constexpr,
    scale: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    sliding: tl.constexpr,
    slots: tl.constexpr,
    keys: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
) -> None:
    kv_head = tl.program_id(1)
    share = tl.program_id(2)
    shares = tl.num_programs(2)
    first = tl.program_id(0) * keys
    place = first + tl.arange(0, keys)
    exists = place < num_context
    at = keys_at(place, kv_head, num_kv_heads, head_dim)
    k, v = load_pair(key, value, at, exists, True, head_dim, width)
    total_key = tl.zeros([keys, width], tl.float32)
    total_value = tl.zeros([keys, width], tl.float32)

    # Blocks begin..end see a row of the tile, those of whole_from..whole_to all of them.
    begin = 0
    end = 0
    whole_from = 0
    whole_to = 0
    for number in range(0, num_blocks, lanes):
        block = number + tl.arange(0, lanes)
        known = block < num_blocks
        low, high = seen_by(starts, ends, block * size, known, size, window, sliding)
        last, _ = seen_by(starts, ends, block * size + size - 1, known, size, window, sliding)
        begin += tl.sum((known & (high <= first)).to(tl.int32), 0)
        whole_from += tl.sum((known & (high < first + keys)).to(tl.int32), 0)
        whole_to += tl.sum((known & (last <= first)).to(tl.int32), 0)
        end += tl.sum((known & (low < first + keys)).to(tl.int32), 0)
    from_slot = begin * size
    to_slot = end * size
    count = (tl.maximum(to_slot - from_slot, 0) + slots - 1) // slots
    before = ((whole_from - begin) * size + slots - 1) // slots
    whole = tl.maximum((whole_to - begin) * size // slots - before, 0)
    part = count - whole

    for tile in range(before + whole * share // shares, before + whole * (share + 1) // shares):
        slot, row, inside = rows_of(
            from_slot + tile * slots, to_slot, kv_head, slots, heads, group, num_heads
        )
        q, grad = load_pair(query, grads, row * head_dim, inside, heads != group, head_dim, width)
        norm = tl.load(norms + row, mask=inside, other=0.0)
        delta = tl.load(deltas + row, mask=inside, other=0.0)
        total_key, total_value = _weigh_keys(
            q, k, v, grad, norm, delta, exists, False, scale, total_key, total_value
        )
    for number in range(part * share // shares, part * (share + 1) // shares):
        tile = tl.where(number < before, number, number + whole)
        slot, row, inside = rows_of(
            from_slot + tile * slots, to_slot, kv_head, slots, heads, group, num_heads
        )
        q, grad = load_pair(query, grads, row * head_dim, inside, True, head_dim, width)
        norm = tl.load(norms + row, mask=inside, other=0.0)
        delta = tl.load(deltas + row, mask=inside, other=0.0)
        low, high = seen_by(starts, ends, slot, inside, size, window, sliding)
        visible = (place[:, None] >= low[None, :]) & (place[:, None] < high[None, :])
        total_key, total_value = _weigh_keys(
            q, k, v, grad, norm, delta, visible, True, scale, total_key, total_value
        )

    at += share.to(tl.int64) * num_context * (num_kv_heads * head_dim)
    _store_pair(grad_key, grad_value, at, exists, total_key, total_value, scale, head_dim, width)


@triton.jit(do_not_specialize=["num_blocks", "window"])
def _own_kernel(
    query: tl.tensor,
    own_key: tl.tensor,
    own_value: tl.tensor,
    grads: tl.tensor,
    norms: tl.tensor,
    deltas: tl.tensor,
    grad_key: tl.tensor,
    grad_value: tl.tensor,
    num_blocks: tl.tensor,
    window: tl.tensor,
    scale: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    sliding: tl.constexpr,
    slots: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
) -> None:
    kv_head = tl.program_id(1)
    first, limit, own_first, own_limit = tile_of(tl.program_id(0), num_blocks, size, slots)
    own_keys: tl.constexpr = slots if slots > 16 else 16
    other = first + tl.arange(0, own_keys)
    exists = other < limit
    at = keys_at(other, kv_head, num_kv_heads, head_dim)
    k, v = load_pair(own_key, own_value, at, exists, True, head_dim, width)
    total_key = tl.zeros([own_keys, width], tl.float32)
    total_value = tl.zeros([own_keys, width], tl.float32)
    for begin in range(own_first, own_limit, slots):
        slot, row, inside = rows_of(begin, own_limit, kv_head, slots, heads, group, num_heads)
        q, grad = load_pair(query, grads, row * head_dim, inside, True, head_dim, width)
        norm = tl.load(norms + row, mask=inside, other=0.0)
        delta = tl.load(deltas + row, mask=inside, other=0.0)
        visible = own_visible(slot[None, :], other[:, None], size, window, sliding)
        total_key, total_value = _weigh_keys(
            q, k, v, grad, norm, delta, visible, True, scale, total_key, total_value
        )

    _store_pair(grad_key, grad_value, at, exists, total_key, total_value, scale, head_dim, width)
