"""RMSNorm of each head and rotary embedding, in one pass, and their gradients.

A program takes all heads of a token. The weight's gradient is summed by a fixed number of programs,
each over a run of tokens, and their parts by torch: always in the same order.

Shape letters: T tokens, N heads, D head size, R rotated dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_PROGRAMS = 1024
NUM_WARPS = 4


def norm_rotate(states: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the rotated rms_norm(states) * weight; `states` [T, N, D], contiguous.

    weight [D]; cos and sin [T, 1, R / 2] float32. Halves of the first R dimensions are paired.
    """
    out = torch.empty_like(states)
    if len(states):
        _forward_kernel[(len(states),)](
            states, weight, cos, sin, out, eps, num_warps=NUM_WARPS, **_shape(states, cos)
        )
    return out


def norm_rotate_backward(
    grad: Tensor, states: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of states [T, N, D] and weight [D]; `grad` is contiguous."""
    out = torch.empty_like(states)
    parts = states.new_zeros(NUM_PROGRAMS, states.shape[2], dtype=torch.float32)
    if len(states):
        _backward_kernel[(NUM_PROGRAMS,)](
            grad, states, weight, cos, sin, out, parts, len(states), eps,
            num_programs=NUM_PROGRAMS, num_warps=NUM_WARPS, **_shape(states, cos),
        )  # fmt: skip
    return out, parts.sum(0).to(weight.dtype)


def _shape(states: Tensor, cos: Tensor) -> dict[str, int]:
    _, num_heads, head_dim = states.shape
    half = cos.shape[-1]
    return {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "half": half,
        "heads": triton.next_power_of_2(num_heads),
        "block": triton.next_power_of_2(half),
        "rest": triton.next_power_of_2(max(1, head_dim - 2 * half)),
    }


@triton.jit
def _forward_kernel(
    states: tl.tensor,
    weight: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
    rest: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, heads)[:, None]
    column = tl.arange(0, block)[None, :]
    inside = (head < num_heads) & (column < half)
    at = row * (num_heads * head_dim) + head * head_dim + column
    a = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(states + at + half, mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    tail = 2 * half + tl.arange(0, rest)[None, :]
    after = (head < num_heads) & (tail < head_dim)
    tail_at = row * (num_heads * head_dim) + head * head_dim + tail
    if 2 * half < head_dim:
        c = tl.load(states + tail_at, mask=after, other=0.0).to(tl.float32)
        square += tl.sum(c * c, 1)
    scale = tl.rsqrt(square / head_dim + eps)[:, None]
    a *= scale * tl.load(weight + column, mask=column < half, other=0.0).to(tl.float32)
    b *= scale * tl.load(weight + half + column, mask=column < half, other=0.0).to(tl.float32)
    cos = tl.load(cosines + row * half + column, mask=column < half, other=0.0)
    sin = tl.load(sines + row * half + column, mask=column < half, other=0.0)
    kind = out.dtype.element_ty
    tl.store(out + at, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(out + at + half, (b * cos + a * sin).to(kind), mask=inside)
    if 2 * half < head_dim:
        c *= scale * tl.load(weight + tail, mask=tail < head_dim, other=0.0).to(tl.float32)
        tl.store(out + tail_at, c.to(kind), mask=after)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grads: tl.tensor,
    states: tl.tensor,
    weight: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    num_tokens: tl.tensor,
    eps: tl.tensor,
    num_programs: tl.constexpr,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
    rest: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, heads)[:, None]
    column = tl.arange(0, block)[None, :]
    tail = 2 * half + tl.arange(0, rest)[None, :]
    inside = (head < num_heads) & (column < half)
    after = (head < num_heads) & (tail < head_dim)
    left = tl.load(weight + column, mask=column < half, other=0.0).to(tl.float32)
    right = tl.load(weight + half + column, mask=column < half, other=0.0).to(tl.float32)
    last = tl.load(weight + tail, mask=tail < head_dim, other=0.0).to(tl.float32)
    part_a = tl.zeros([heads, block], tl.float32)
    part_b = tl.zeros([heads, block], tl.float32)
    part_c = tl.zeros([heads, rest], tl.float32)
    kind = out.dtype.element_ty
    row = program
    while row < num_tokens:
        at = row * (num_heads * head_dim) + head * head_dim + column
        tail_at = row * (num_heads * head_dim) + head * head_dim + tail
        cos = tl.load(cosines + row * half + column, mask=column < half, other=0.0)
        sin = tl.load(sines + row * half + column, mask=column < half, other=0.0)
        a = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(states + at + half, mask=inside, other=0.0).to(tl.float32)
        turned = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(grads + at + half, mask=inside, other=0.0).to(tl.float32)
        grad_a = turned * cos + other * sin
        grad_b = other * cos - turned * sin
        square = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if 2 * half < head_dim:
            c = tl.load(states + tail_at, mask=after, other=0.0).to(tl.float32)
            grad_c = tl.load(grads + tail_at, mask=after, other=0.0).to(tl.float32)
            square += tl.sum(c * c, 1)
        scale = tl.rsqrt(square / head_dim + eps)[:, None]
        a *= scale
        b *= scale
        part_a += grad_a * a
        part_b += grad_b * b
        grad_a *= left
        grad_b *= right
        product = tl.sum(grad_a * a, 1) + tl.sum(grad_b * b, 1)
        if 2 * half < head_dim:
            c *= scale
            part_c += grad_c * c
            grad_c *= last
            product += tl.sum(grad_c * c, 1)
        mean = (product / head_dim)[:, None]
        tl.store(out + at, ((grad_a - a * mean) * scale).to(kind), mask=inside)
        tl.store(out + at + half, ((grad_b - b * mean) * scale).to(kind), mask=inside)
        if 2 * half < head_dim:
            tl.store(out + tail_at, ((grad_c - c * mean) * scale).to(kind), mask=after)
        row += num_programs
    lane = tl.arange(0, block)
    parts += program * head_dim
    tl.store(parts + lane, tl.sum(part_a, 0), mask=lane < half)
    tl.store(parts + half + lane, tl.sum(part_b, 0), mask=lane < half)
    if 2 * half < head_dim:
        lane = 2 * half + tl.arange(0, rest)
        tl.store(parts + lane, tl.sum(part_c, 0), mask=lane < head_dim)
