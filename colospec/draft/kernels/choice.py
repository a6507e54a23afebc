"""Where the Triton kernels run: one question, asked by every operation that has one."""

from __future__ import annotations

import torch
from torch import Tensor


def fused(tensor: Tensor) -> bool:
    """Return whether operations on `tensor` run as kernels: on CUDA, except in float64, as kernels
    accumulate in float32."""
    return tensor.device.type == "cuda" and tensor.dtype is not torch.float64
