"""silu(gate) * up, elementwise, and its gradients.

Shape letters: T tokens, I MLP width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
NUM_WARPS = 8


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; both [T, I], contiguous."""
    out = torch.empty_like(gate)
    _forward_kernel[_grid(gate)](
        gate, up, out, width=gate.shape[1], block=BLOCK, num_warps=NUM_WARPS
    )
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the product silu(gate) * up again, and the gradients of gate and up.

    The gradient of up is written over `grad`, that of the product.
    """
    product, grad_gate = torch.empty_like(gate), torch.empty_like(gate)
    _backward_kernel[_grid(gate)](
        grad, gate, up, product, grad_gate, width=gate.shape[1], block=BLOCK, num_warps=NUM_WARPS
    )
    return product, grad_gate, grad


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], BLOCK)


@triton.jit
def _forward_kernel(
    gate: tl.tensor, up: tl.tensor, out: tl.tensor, width: tl.constexpr, block: tl.constexpr
) -> None:
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    index = tl.program_id(0).to(tl.int64) * width + column
    x = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grads: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    product: tl.tensor,
    grad_gate: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    index = tl.program_id(0).to(tl.int64) * width + column
    grad = tl.load(grads + index, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(x)
    active = x * sigmoid
    slope = sigmoid * (1 + x - active)
    kind = product.dtype.element_ty
    tl.store(product + index, (active * y).to(kind), mask=inside)
    tl.store(grad_gate + index, (grad * y * slope).to(kind), mask=inside)
    tl.store(grads + index, (grad * active).to(kind), mask=inside)
