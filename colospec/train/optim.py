"""AdamW on fp32 master weights, the learning-rate schedules, and the norms of the gradients.

A step never waits for the device: the kernel of the optimizer reads from the device by how much to
scale the gradients and whether to leave out the update; the host learns of it when it asks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colospec.config import Schedule, TrainerConfig

log = logging.getLogger(__name__)

MAX_UNREAD = 256
"""Norms on the device before the host reads them, if nobody has asked for them earlier."""


def build_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    first, second = config.betas
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True
    )


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


def clip_and_step(
    optimizer: torch.optim.AdamW, max_norm: float, denominator: Tensor | None = None
) -> Tensor:
    """Update the parameters with gradients scaled to a global norm of at most `max_norm`.

    `denominator`, a float32 scalar on the device, divides the gradients first; 0 stands for a step
    without a supervised token, whose gradients are zero. Where the norm is NaN or Inf nothing is
    updated, not even the optimizer's count of steps. Returns the norm before clipping, a float32
    scalar on the device, equal on all trainers. Scaling costs no pass of its own: the fused kernel
    divides the gradients by `grad_scale` as it reads them. They are not to be used afterwards.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(parameters)
    scale = torch.ones_like(norm)
    if denominator is not None:
        scale = torch.where(denominator > 0, denominator, scale)
        norm = norm / scale
    scale *= ((norm + 1e-6) / max_norm).clamp(min=1.0)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()
    # They would be taken for those of the next step, also by who loads a checkpoint.
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    return norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the global norm of the gradients over all shards: a plain scalar on the device."""
    grads = [p.grad for p in parameters if p.grad is not None]
    shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    norm = nn.utils.get_total_norm(shards)
    if not any(isinstance(grad, DTensor) for grad in grads):
        return norm
    square = norm.square()
    dist.all_reduce(square)
    return square.sqrt()


class NormLog:
    """The gradient norms of a run's steps: left on the device until somebody asks.

    Norms are equal on all trainers, so that all warn and fail alike.
    """

    def __init__(self, max_skipped_steps: int) -> None:
        self._limit = max_skipped_steps
        self._unread: list[tuple[int, Tensor]] = []
        self._window: list[float] = []
        self._skipped: list[int] = []
        """The latest steps without an update, if the very latest step was one."""

    def add(self, step: int, norm: Tensor) -> None:
        """Note the norm (a scalar) of `step`; reads them all if they have become many."""
        self._unread.append((step, norm))
        if len(self._unread) >= MAX_UNREAD:
            self.check()

    def check(self) -> None:
        """Wait for the device and read. Raises RuntimeError if too many steps in a row were bad."""
        if not self._unread:
            return
        norms = torch.stack([norm for _, norm in self._unread]).tolist()
        for (step, _), norm in zip(self._unread, norms, strict=True):
            self._window.append(norm)
            if math.isfinite(norm):
                self._skipped.clear()
                continue
            self._skipped.append(step)
            log.warning("step %d skipped: gradient norm %s", step, norm)
            if len(self._skipped) >= self._limit:
                raise RuntimeError(
                    f"gradients were not finite for {self._limit} steps in a row, steps "
                    f"{self._skipped[0]} to {step}; lower trainer.lr or resume from an earlier "
                    "checkpoint"
                )
        self._unread.clear()

    def read(self) -> dict[str, float]:
        """Return the mean norm and the share of skipped steps since the last call; {} if none.

        Raises as `check` does.
        """
        self.check()
        window, self._window = self._window, []
        if not window:
            return {}
        num_bad = sum(not math.isfinite(norm) for norm in window)
        return {"grad_norm": sum(window) / len(window), "skipped": num_bad / len(window)}
