"""`trainer.*`: how the draft learns, is kept and is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from colospec.config.dtype import Dtype
from colospec.config.ranges import check_numbers


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class InitVocab(Enum):
    """Pruned vocabulary of a draft that training starts from: keep its own, or rebuild it from the
    supervised tokens of this data."""

    keep = "keep"
    rebuild = "rebuild"


@dataclass
class TrainerConfig:
    lr: float = 1e-4
    min_lr: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    schedule: Schedule = Schedule.cosine
    warmup_fraction: float = 0.015
    """Share of all steps over which the learning rate rises from 0."""
    decay_fraction: float = 0.2
    """wsd: share of all steps, at the end, over which it falls to min_lr."""
    epochs: int = 1
    max_steps: int | None = None
    """Stop after this many optimizer steps; null trains for `epochs`."""
    accumulation: int = 1
    """Micro-batches per trainer and optimizer step."""
    dtype: Dtype = Dtype.auto
    """Type of the draft's computation; auto is bfloat16 on CUDA and float32 on the CPU. Master
    weights, optimizer state and losses are float32 in any case."""
    deterministic: bool = False
    """Use deterministic kernels alone: the same seed gives the same losses, more slowly."""
    log_interval: int = 10
    save_interval: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Checkpoints to keep, beside the best one."""
    best_metric: str = "train/loss"
    """The checkpoint with the lowest value of it is kept; a name ending in _length: the highest."""
    max_skipped_steps: int = 5
    """Consecutive steps with NaN or Inf gradients (skipped on all ranks) before the run fails."""
    init_from: str | None = None
    """Exported draft directory to start from; null starts from random weights."""
    init_vocab: InitVocab = InitVocab.keep
    """init_from: whose pruned vocabulary the draft gets; rows of the head that the exported draft
    does not have start from the target's."""
    eval_interval: int = 0
    """Steps between evaluations on the held-out samples, and one at the end; 0 makes none."""
    probe_interval: int = 0
    """Steps between probes, and one at the end: the draft is exported, loaded back, and decodes
    held-out prompts for real; 0 makes none."""
    probe_prompts: int = 4
    """Held-out samples whose beginnings are the prompts of a probe."""
    probe_tokens: int = 32
    """Tokens that a probe decodes for each prompt."""
    probe_alarm: float = 0.1
    """Gap between real and simulated acceptance length, as a share of the simulated one, above
    which a probe warns."""

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        check_numbers(
            self,
            prefix="trainer.",
            at_least={
                "accumulation": 1,
                "epochs": 1,
                "eval_interval": 0,
                "keep": 1,
                "log_interval": 1,
                "lr": 0,
                "max_skipped_steps": 1,
                "max_steps": 1,
                "min_lr": 0,
                "probe_interval": 0,
                "probe_prompts": 1,
                "probe_tokens": 2,
                "save_interval": 0,
                "weight_decay": 0,
            },
            above_zero=("eps", "max_grad_norm", "probe_alarm"),
            at_most_one=("decay_fraction", "warmup_fraction"),
        )
        if self.min_lr > self.lr:
            raise ValueError(f"trainer.min_lr={self.min_lr} is above trainer.lr={self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"trainer.betas={self.betas} must be two numbers in [0, 1)")
        if self.dtype is Dtype.float16:
            raise ValueError(
                "trainer.dtype=float16 would need loss scaling; use bfloat16 or float32"
            )
