"""What bench_step.py measures: a draft with random weights, and one micro-batch on its device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from workloads import TINY_TARGET, settings

from colospec.batch import Cursor, FeatureBatch, Features, FeatureSpec, TokenBatch
from colospec.config import DraftConfig, Dtype, TrainerConfig
from colospec.draft import catalog, registry
from colospec.draft.base import LossTerms, StepContext
from colospec.draft.pruned import PrunedDraft
from colospec.target import Target
from colospec.train.find_target import CONFIGS
from colospec.train.fsdp import compute_dtype, shard
from colospec.train.optim import build_optimizer, clip_and_step

LENGTHS = (2048,) * 4
TINY_LENGTHS = (20, 1, 33)
TINY = {
    "block_size": 4, "draft_vocab_size": 128, "num_anchors": 8, "num_layers": 2, "ttt_length": 3,
}  # fmt: skip
"""Settings of a tiny draft, as far as an algorithm has them."""


def draft_config(name: str, overrides: Sequence[str], *, tiny: bool) -> DraftConfig:
    """Return the settings of draft=`name`, with `overrides` such as draft.num_layers=2."""
    known = {field.name for field in dataclasses.fields(catalog.find(name).config)}
    small = [f"draft.{key}={value}" for key, value in TINY.items() if tiny and key in known]
    return settings(["+mode=colocate", f"draft={name}", *small, *overrides]).draft


def make_target(*, tiny: bool) -> Target:
    """Return the shape of Qwen3-8B, or a tiny one."""
    file = CONFIGS / "Qwen3-8B.json"
    return Target.from_config(
        Path("/random"), TINY_TARGET if tiny else json.loads(file.read_text())
    )


class Case:
    """A draft on `device` in the type that it computes in, and documents of `lengths` tokens, every
    one supervised."""

    def __init__(
        self, config: DraftConfig, target: Target, lengths: Sequence[int], device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.config, self.target, self.device = config, target, device
        self.dtype = compute_dtype(Dtype.auto, device)
        kind = registry.find(config.algorithm)
        counts = torch.rand(target.vocab_size)
        # On the device, as a billion random numbers keep a host busy for long.
        with device:
            self.draft = kind.from_config(config, target, token_counts=counts)
        self.draft.to(device, self.dtype)
        matrix = (target.vocab_size, target.hidden_size)
        embedding, head = self.normal(*matrix) * 0.02, self.normal(*matrix) * 0.02
        self.draft.set_target(embedding, None if target.tied else head)
        ids = [torch.randint(0, target.vocab_size, (length,)) for length in lengths]
        self.tokens = TokenBatch.pack(
            Cursor(0, 0, 0), range(len(ids)), ids, [torch.ones(len(part)).bool() for part in ids]
        )
        self.batch = FeatureBatch(self.tokens, self._features(kind.features(config, target)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.normal(*shape).requires_grad_()

    @property
    def num_samples(self) -> int:
        return self.tokens.num_sequences

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.draft.parameters())

    def step(self) -> LossTerms:
        """Go forward and backward, always with the same draw of what the algorithm draws."""
        self.draft.zero_grad(set_to_none=True)
        context = StepContext(0, 1, self.tokens.num_tokens, torch.Generator().manual_seed(0))
        terms = self.draft(self.batch, context)
        terms.loss.backward()
        return terms  # type: ignore[no-any-return]

    def loss(self) -> float:
        """Return what a step reports as its loss."""
        total, count = self.step().metrics["loss"]
        return float(total / count)

    def optimizer_step(self) -> Callable[[], None]:
        """Shard the draft (for good), in a world of its own that the caller has joined; returns
        what the trainer does in a step: forward, backward, and the update."""
        for parameter in self.draft.parameters():
            parameter.data = parameter.data.float()
        shard(self.draft, world_size=1, dtype=self.dtype)
        trainer = TrainerConfig()
        optimizer = build_optimizer(self.draft, trainer)

        def run() -> None:
            denominator = self.step().denominator
            if denominator is not None:
                denominator = denominator.to(torch.float32)
                dist.all_reduce(denominator)
            clip_and_step(optimizer, trainer.max_grad_norm, denominator)
            optimizer.zero_grad()

        return run

    def _features(self, spec: FeatureSpec) -> Features:
        """Make what the draft asks for. The target's favourite token is always one that the draft
        can say, and wins by far, as in a trained target."""
        num_tokens, size = self.tokens.num_tokens, self.target.hidden_size
        aux = self.normal(num_tokens, len(spec.aux_layer_ids) * size)
        if not spec.last_hidden_states:
            return Features(aux, None)
        draft = self.draft
        known = draft.target_ids if isinstance(draft, PrunedDraft) else None
        number = self.target.vocab_size if known is None else len(known)
        favourites = torch.randint(0, number, (num_tokens,), device=self.device)
        last = draft.frozen_head[favourites if known is None else known[favourites]]
        last = last * 12 + self.normal(num_tokens, size) * 0.1
        return Features(aux, last.to(self.dtype))
