"""AdamW on fp32 master weights, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colospec.config import Schedule, TrainerConfig


def build_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps)


def learning_rate(step: int, total_steps: int, config: TrainerConfig) -> float:
    """Return the rate for optimizer step `step` (from 0): warm-up, then the schedule's shape.

    Past `total_steps` (an estimate where the data decides) it stays at its last value.
    """
    warmup = int(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    span = config.lr - config.min_lr
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    if config.schedule is Schedule.cosine:
        return config.min_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule is Schedule.linear:
        return config.min_lr + span * (1 - progress)
    if config.schedule is Schedule.constant:
        return config.lr
    tail = config.decay_fraction * total_steps
    left = (total_steps - step) / tail if tail else 1.0
    return config.min_lr + span * min(max(left, 0.0), 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm` over all shards; return the norm.

    The result is a plain scalar tensor on the device, equal on all trainers, and NaN or Inf where
    any gradient is.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
