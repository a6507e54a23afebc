"""What both roles of a run load alike: target facts, data, plan, and where to start."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from colospec import demo
from colospec.batch import Cursor, FeatureSpec, TokenBatch
from colospec.config import DataConfig, Dtype, RunConfig
from colospec.data.dataset import Dataset, prepare
from colospec.data.held_out import HeldOut, Ids, Split, split
from colospec.data.pack import Bin, Plan, Step
from colospec.draft import registry
from colospec.launch import visible_gpus
from colospec.target import Target
from colospec.train.find_target import target_directory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins: the next micro-batch of the plan, and completed optimizer steps.

    `owes_evaluation`: the last run stopped before the evaluation that follows the last of them.
    """

    epoch: int = 0
    micro_batch: int = 0
    step: int = 0
    owes_evaluation: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What is measured once step number `step` of the plan has been made.

    `bins` are the held-out micro-batches, the same number for each trainer, and none where only a
    probe is due; `has_probe`: real decoding follows them.
    """

    epoch: int
    step: int
    bins: tuple[Bin, ...]
    num_loss_tokens: int
    has_probe: bool


@dataclass(frozen=True)
class Job:
    """One run's facts, equal on all ranks."""

    run: RunConfig
    target: Target
    dataset: Dataset
    plan: Plan
    spec: FeatureSpec
    num_trainers: int
    total_steps: int
    split: Split | None = None
    """None trains on the whole dataset."""

    @classmethod
    def load(cls, run: RunConfig, *, num_trainers: int, progress: bool) -> Job:
        """Find the target, tokenise the data (once per machine) and lay out the plan."""
        target = load_target(run)
        data = data_with_path(run.data, run.target.path)

        def tokenised(config: DataConfig, setting: str) -> Dataset:
            return prepare(
                config,
                tokenizer_path=target.path,
                vocab_size=target.vocab_size,
                progress=progress,
                setting=setting,
            )

        dataset, other = tokenised(data, "data.path"), None
        if data.held_out_path is not None:
            other = tokenised(replace(data, path=data.held_out_path), "data.held_out_path")
        parts = split(dataset, data, other=other, sizes=lambda part: sizes(run, part))
        plan = lay_out(run, dataset, fingerprint=parts.fingerprint, samples=parts.train_ids)
        per_step = num_trainers * run.trainer.accumulation
        total = run.trainer.max_steps or plan.estimate_steps(per_step, run.trainer.epochs)
        spec = registry.features(run.draft, target)
        return cls(run, target, dataset, plan, spec, num_trainers, total, parts)

    @property
    def held_out(self) -> HeldOut | None:
        """What is evaluated on, if anything."""
        return None if self.split is None else self.split.held_out

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """How often each token [V] is supervised in what is trained on."""
        return self.dataset.token_counts if self.split is None else self.split.token_counts

    @property
    def micro_batches_per_step(self) -> int:
        """Over all trainers."""
        return self.num_trainers * self.run.trainer.accumulation

    def resumed(self, start: Start, meta: dict[str, Any]) -> Job:
        """Return the job with the total that its learning rate counts to after a resume.

        As many steps as before where they are of the same size; else those done and those that the
        rest of the data makes in the new size.
        """
        trainer = self.run.trainer
        same = meta["micro_batches_per_step"] == self.micro_batches_per_step
        if trainer.max_steps is not None:
            return self
        if same and meta["run"]["trainer"]["epochs"] == trainer.epochs:
            return replace(self, total_steps=meta["total_steps"])
        whole = self.plan.estimate_steps(1, trainer.epochs)
        done = start.epoch * self.plan.estimate_steps(1, 1) + start.micro_batch
        left = math.ceil(max(whole - done, 0) / self.micro_batches_per_step)
        return replace(self, total_steps=start.step + left)

    def steps(self, start: Start) -> Iterator[Step]:
        """Yield the optimizer steps from `start` on, all micro-batches of all trainers in each.

        With trainer.max_steps the data is gone through as often as it takes.
        """
        trainer = self.run.trainer
        steps = self.plan.steps(
            micro_batches_per_step=self.micro_batches_per_step,
            start_epoch=start.epoch,
            start_micro_batch=start.micro_batch,
            start_step=start.step,
            epochs=trainer.epochs if trainer.max_steps is None else 2**31,
        )
        for step in steps:
            if trainer.max_steps is not None and step.step >= trainer.max_steps:
                return
            yield step

    def work(self, start: Start) -> Iterator[tuple[Step | None, Evaluation | None]]:
        """Yield `steps`, each with the evaluation that follows it, if one does.

        One follows every `interval` steps, and the last step of the run. An evaluation that `start`
        owes comes first, without a step.
        """
        steps = self.steps(start)
        step = next(steps, None)
        if start.owes_evaluation:
            yield None, self._evaluation(start.epoch, start.step - 1, is_last=step is None)
        while step is not None:
            following = next(steps, None)
            yield step, self._evaluation(step.epoch, step.step, is_last=following is None)
            step = following

    def micro_batches(self, part: Step | Evaluation, trainer_rank: int) -> Iterator[TokenBatch]:
        """Yield one trainer's part: micro-batch m belongs to trainer m % trainers."""
        if isinstance(part, Evaluation):
            assert self.held_out is not None
            dataset, first = self.held_out.dataset, 0
        else:
            dataset, first = self.dataset, part.micro_batch
        for index in range(trainer_rank, len(part.bins), self.num_trainers):
            cursor = Cursor(part.epoch, first + index, part.step)
            yield dataset.batch(cursor, part.bins[index])

    def _evaluation(self, epoch: int, step: int, *, is_last: bool) -> Evaluation | None:
        """Return what follows step number `step`."""

        def is_due(interval: int) -> bool:
            return bool(interval) and (is_last or (step + 1) % interval == 0)

        trainer, held_out = self.run.trainer, self.held_out
        evaluates, has_probe = is_due(trainer.eval_interval), is_due(trainer.probe_interval)
        if held_out is None or not (evaluates or has_probe):
            return None
        bins = held_out.bins if evaluates else ()
        filled = bins + ((),) * (-len(bins) % self.num_trainers)
        return Evaluation(epoch, step, filled, held_out.num_loss_tokens(), has_probe)


def lay_out(
    run: RunConfig, dataset: Dataset, *, fingerprint: str, samples: Ids | None = None
) -> Plan:
    """Return the plan of a run through `samples` of a dataset, or all of it."""
    return Plan(
        dataset.lengths,
        dataset.num_loss_tokens,
        seed=run.seed,
        token_budget=run.data.token_budget,
        max_sequences=run.data.max_sequences,
        fingerprint=fingerprint,
        sizes=sizes(run, dataset),
        samples=samples,
    )


def sizes(run: RunConfig, dataset: Dataset) -> NDArray[np.int64]:
    """Return what each sample takes of data.token_budget, [N]; see `DraftModel.sizes`."""
    draft = registry.find(run.draft.algorithm)
    lengths, supervised = dataset.lengths, dataset.num_loss_tokens
    return draft.sizes(run.draft, lengths, supervised, token_budget=run.data.token_budget)


def load_target(run: RunConfig) -> Target:
    """Find the target (see `find_target`) and read its facts.

    With target.dtype=auto a float32 model runs in bfloat16 on a GPU, as it does when served: fast
    kernels know no float32.
    """
    target = Target.load(target_directory(run.target), dtype=run.target.dtype.value)
    is_wide = run.target.dtype is Dtype.auto and target.dtype is torch.float32
    return replace(target, dtype=torch.bfloat16) if is_wide and visible_gpus() else target


def data_with_path(data: DataConfig, target_path: str | None) -> DataConfig:
    """Return `data` with the built-in demo text in place of a missing path."""
    if data.path is not None:
        return data
    if target_path is not None:
        log.warning("data.path is not set: training on the built-in demo text")
    return replace(data, path=str(demo.ensure_data().train_path))
