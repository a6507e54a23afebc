"""Sharding of the draft: one FSDP2 root, summed gradients, fp32 master weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from colospec.config import Dtype


def compute_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the type of the draft's computation: auto is bfloat16 on CUDA, float32 on a CPU."""
    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return cast(torch.dtype, getattr(torch, dtype.value))


def shard(model: nn.Module, *, world_size: int, dtype: torch.dtype) -> FSDPModule:
    """Shard `model` over the default group (all trainers) as a single unit, also when that is one.

    Parameters stay float32 and are gathered in `dtype`; gradients are reduced in float32 and
    *summed*: losses already carry 1 / (supervised tokens of the whole step), so the sum over ranks
    and micro-batches is the gradient of the whole batch. One unit, because the layers run several
    times per forward and would be gathered each time.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    sharded = cast(FSDPModule, model)
    # In this order: the divide factor alone is refused by gloo.
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_gradient_divide_factor(1.0)
    return sharded
