"""Attention of blocks: each sees the context before its anchor, and itself; flash style, forward.

A program is one key-value head and a tile of slots with the query heads that share it: some whole
blocks, or a part of one where blocks are long. Anchors ascend and a document's context rows follow
those of the one before, so what a tile may see is one run of context rows: most of it visible to
all rows of the tile, and only the rest is masked. Which rows a block sees is read from two tables,
so nothing depends on the number of blocks or of documents, and nothing is compiled for it.

Shape letters: N blocks of b slots, C context rows, Q query heads, M key-value heads (M divides Q),
D head size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """How much a program takes: query rows (slots times heads) and keys at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Reach(NamedTuple):
    """What blocks of `size` slots may see; int64 tables.

    starts [N]: first context row of the block's document; ends [N]: one past the last row before
    its anchor. `window` 0 is a full layer, in which the block also sees all of itself.
    """

    starts: Tensor
    ends: Tensor
    size: int
    window: int


FORWARD = Tile(rows=128, keys=64, num_warps=8, num_stages=3)
# Products of float32 do not run on tensor cores, and their operands are twice as large.
SMALL = Tile(rows=32, keys=32, num_warps=4, num_stages=1)


def attend(
    query: Tensor, context: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor], reach: Reach
) -> tuple[Tensor, Tensor]:
    """Return what all slots see [N * b, Q, D], and the logarithm to base 2 of the sum of their
    exponentials [N * b, Q] float32.

    query [N * b, Q, D]; context: keys and values [C, M, D]; block: keys and values [N * b, M, D];
    all contiguous.
    """
    out = torch.empty_like(query)
    norm = query.new_empty(query.shape[:2], dtype=torch.float32)
    if len(query):
        tile = fit(FORWARD, query)
        _forward_kernel[grid(query, context[0], reach, tile)](
            query, *context, *block, reach.starts, reach.ends, out, norm, len(reach.ends),
            reach.window, keys=tile.keys, **settings(query, context[0], reach, tile),
        )  # fmt: skip
    return out, norm


def fit(tile: Tile, query: Tensor) -> Tile:
    """Shrink a tile that was chosen for two bytes and a head size of 128."""
    if query.dtype is torch.float32:
        return SMALL
    if query.shape[2] > 128:
        return tile._replace(rows=tile.rows // 2, keys=tile.keys // 2)
    return tile


def settings(query: Tensor, key: Tensor, reach: Reach, tile: Tile) -> dict[str, int | float]:
    """Return what is compiled into every kernel."""
    _, num_heads, head_dim = query.shape
    group = num_heads // key.shape[1]
    return {
        "scale": math.log2(math.e) / math.sqrt(head_dim),
        "num_heads": num_heads,
        "num_kv_heads": key.shape[1],
        "head_dim": head_dim,
        "group": group,
        "size": reach.size,
        "sliding": reach.window > 0,
        "slots": _slots(tile, group),
        "heads": triton.next_power_of_2(group),
        "width": max(16, triton.next_power_of_2(head_dim)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def grid(query: Tensor, key: Tensor, reach: Reach, tile: Tile) -> tuple[int, int]:
    """Return how many tiles of slots there are, see `tile_of`, and for how many heads each."""
    slots, size = _slots(tile, query.shape[1] // key.shape[1]), reach.size
    if size > slots:
        return len(reach.ends) * triton.cdiv(size, slots), key.shape[1]
    return triton.cdiv(len(reach.ends), slots // size), key.shape[1]


def _slots(tile: Tile, group: int) -> int:
    heads: int = triton.next_power_of_2(group)
    return max(1, tile.rows // heads)


@triton.jit
def tile_of(
    program: tl.tensor, num_blocks: tl.tensor, size: tl.constexpr, slots: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return a tile's first slot and one past its last, and the same of its blocks."""
    if size <= slots:
        whole: tl.constexpr = slots // size * size
        first = program * whole
        limit = tl.minimum(first + whole, num_blocks * size)
        own_first = first
        own_limit = limit
    else:
        parts: tl.constexpr = (size + slots - 1) // slots
        own_first = program // parts * size
        own_limit = own_first + size
        first = own_first + program % parts * slots
        limit = tl.minimum(first + slots, own_limit)
    return first, limit, own_first, own_limit


@triton.jit
def rows_of(
    first: tl.tensor, limit: tl.tensor, kv_head: tl.tensor, slots: tl.constexpr,
    heads: tl.constexpr, group: tl.constexpr, num_heads: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Return slot, number among the query heads of all slots, and whether it exists, of each row of
    a tile."""
    row = tl.arange(0, slots * heads)
    slot = first + row // heads
    head = row % heads
    inside = (slot < limit) & (head < group)
    return slot, slot.to(tl.int64) * num_heads + kv_head * group + head, inside


@triton.jit
def keys_at(
    place: tl.tensor, kv_head: tl.tensor, num_kv_heads: tl.constexpr, head_dim: tl.constexpr
) -> tl.tensor:
    """Return the offsets of one head's keys, and of its values, at `place`."""
    return (place.to(tl.int64) * num_kv_heads + kv_head) * head_dim


@triton.jit
def load_rows(
    base: tl.tensor, at: tl.tensor, inside: tl.tensor, checked: tl.constexpr,
    head_dim: tl.constexpr, width: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load [rows, width] from offsets `at` [rows], zeros where not `inside`, if `checked`."""
    column = tl.arange(0, width)[None, :]
    place = base + at[:, None] + column
    if head_dim == width:
        if checked:
            return tl.load(place, mask=inside[:, None], other=0.0)
        else:
            return tl.load(place)
    else:
        return tl.load(place, mask=inside[:, None] & (column < head_dim), other=0.0)


@triton.jit
def load_pair(
    key: tl.tensor, value: tl.tensor, at: tl.tensor, inside: tl.tensor, checked: tl.constexpr,
    head_dim: tl.constexpr, width: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Load keys and values, or whatever lies alike, as `load_rows` does."""
    k = load_rows(key, at, inside, checked, head_dim, width)
    v = load_rows(value, at, inside, checked, head_dim, width)
    return k, v


@triton.jit
def seen_by(
    starts: tl.tensor, ends: tl.tensor, slot: tl.tensor, inside: tl.tensor, size: tl.constexpr,
    window: tl.tensor, sliding: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return the first context row that slots see, and one past the last; none where not
    `inside`."""
    low = tl.load(starts + slot // size, mask=inside, other=0).to(tl.int32)
    high = tl.load(ends + slot // size, mask=inside, other=0).to(tl.int32)
    if sliding:
        low = tl.maximum(low, high + slot % size + 1 - window)
    return low, high


@triton.jit
def run_of(
    starts: tl.tensor, ends: tl.tensor, first: tl.tensor, limit: tl.tensor, size: tl.constexpr,
    window: tl.tensor, sliding: tl.constexpr, keys: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Return the run of context rows that slots first..limit see, in tiles of `keys`: first row,
    one past the last, number of tiles, and which of them all slots see: the first, and how many."""
    low, full_end = seen_by(starts, ends, first, first < limit, size, window, sliding)
    full_start, high = seen_by(starts, ends, limit - 1, first < limit, size, window, sliding)
    count = (tl.maximum(high - low, 0) + keys - 1) // keys
    before = (tl.maximum(full_start - low, 0) + keys - 1) // keys
    whole = tl.maximum(full_end - low - before * keys, 0) // keys
    return low, high, count, before, whole


@triton.jit
def own_visible(
    slot: tl.tensor, other: tl.tensor, size: tl.constexpr, window: tl.tensor, sliding: tl.constexpr
) -> tl.tensor:
    """Whether `slot` sees `other`, both broadcastable, by their blocks."""
    visible = slot // size == other // size
    if sliding:
        visible = visible & (other <= slot) & (other > slot - window)
    return visible


@triton.jit
def _fold(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, visible: tl.tensor, masked: tl.constexpr,
    total: tl.tensor, mass: tl.tensor, top: tl.tensor, scale: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add a tile of keys to the running sums of the softmax."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if masked:
        score = tl.where(visible, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1) * scale)
    share = tl.exp2(score * scale - higher[:, None])
    fade = tl.exp2(top - higher)
    mass = mass * fade + tl.sum(share, 1)
    total = tl.dot(share.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
    return total, mass, higher


@triton.jit(do_not_specialize=["num_blocks", "window"])
def _forward_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    own_key: tl.tensor,
    own_value: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    norm: tl.tensor,
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
    q = load_rows(query, row * head_dim, inside, True, head_dim, width)
    low, high = seen_by(starts, ends, slot, inside, size, window, sliding)
    start, end, count, before, whole = run_of(
        starts, ends, first, limit, size, window, sliding, keys
    )
    # Low enough for any score, and not so low that a difference is not a number.
    top = tl.full([slots * heads], -1e30, tl.float32)
    mass = tl.zeros([slots * heads], tl.float32)
    total = tl.zeros([slots * heads, width], tl.float32)
    lane = tl.arange(0, keys)

    for tile in range(before, before + whole):
        place = start + tile * keys + lane
        at = keys_at(place, kv_head, num_kv_heads, head_dim)
        k, v = load_pair(key, value, at, place < end, False, head_dim, width)
        total, mass, top = _fold(q, k, v, inside, False, total, mass, top, scale)
    for number in range(0, count - whole):
        tile = tl.where(number < before, number, number + whole)
        place = start + tile * keys + lane
        at = keys_at(place, kv_head, num_kv_heads, head_dim)
        k, v = load_pair(key, value, at, place < end, True, head_dim, width)
        visible = (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])
        total, mass, top = _fold(q, k, v, visible, True, total, mass, top, scale)
    own_keys: tl.constexpr = slots if slots > 16 else 16
    for own in range(own_first, own_limit, own_keys):
        other = own + tl.arange(0, own_keys)
        exists = other < own_limit
        at = keys_at(other, kv_head, num_kv_heads, head_dim)
        k, v = load_pair(own_key, own_value, at, exists, True, head_dim, width)
        visible = (
            own_visible(slot[:, None], other[None, :], size, window, sliding) & exists[None, :]
        )
        total, mass, top = _fold(q, k, v, visible, True, total, mass, top, scale)

    column = tl.arange(0, width)[None, :]
    mine = inside[:, None] & (column < head_dim)
    mass = tl.where(inside, mass, 1.0)
    total = total / mass[:, None]
    tl.store(out + row[:, None] * head_dim + column, total.to(out.dtype.element_ty), mask=mine)
    tl.store(norm + row, top + tl.log2(mass), mask=inside)
