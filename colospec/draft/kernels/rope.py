"""Rotary embedding, forward and back.

Shape letters: T tokens, N heads, D head size, R rotated dimensions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4


def rotate_into(
    out: Tensor, states: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False
) -> Tensor:
    """Rotate the first R dimensions of `states` [T, N, D], halves paired, and return `out`.

    Both are contiguous, and may be the same tensor. cos and sin: [T, 1, R / 2] float32. `back`
    turns the other way.
    """
    num_tokens, num_heads, head_dim = states.shape
    half = cos.shape[-1]
    _rotate_kernel[(num_tokens,)](
        out, states, cos, sin,
        num_heads=num_heads, head_dim=head_dim, half=half, back=back,
        heads=triton.next_power_of_2(num_heads), block=triton.next_power_of_2(half),
        rest=triton.next_power_of_2(max(1, head_dim - 2 * half)), num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_kernel(
    out: tl.tensor,
    states: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    back: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
    rest: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, heads)[:, None]
    column = tl.arange(0, block)[None, :]
    cos = tl.load(cosines + row * half + column, mask=column < half, other=0.0)
    sin = tl.load(sines + row * half + column, mask=column < half, other=0.0)
    if back:
        sin = -sin
    inside = (head < num_heads) & (column < half)
    first = row * (num_heads * head_dim) + head * head_dim + column
    a = tl.load(states + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(states + first + half, mask=inside, other=0.0).to(tl.float32)
    # Several threads may hold an element; all have read it before one of them writes in place.
    tl.debug_barrier()
    kind = out.dtype.element_ty
    tl.store(out + first, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(out + first + half, (b * cos + a * sin).to(kind), mask=inside)
    if 2 * half < head_dim:
        column = 2 * half + tl.arange(0, rest)[None, :]
        same = row * (num_heads * head_dim) + head * head_dim + column
        inside = (head < num_heads) & (column < head_dim)
        tl.store(out + same, tl.load(states + same, mask=inside), mask=inside)
