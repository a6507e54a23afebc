"""The trainer's side of a run: learn the draft from the features, step by step."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from colospec.batch import FeatureBatch, FeatureSource
from colospec.checkpoint.dcp import Checkpointer
from colospec.checkpoint.export import export_draft
from colospec.checkpoint.manifest import open_checkpoint
from colospec.checkpoint.rng import capture_rng, rank_seed, restore_rng, seed_rng
from colospec.data.pack import Step
from colospec.draft.base import StepContext
from colospec.metrics import Sums
from colospec.train.build import build_draft
from colospec.train.evaluation import accuracies, evaluate
from colospec.train.fsdp import compute_dtype, shard
from colospec.train.job import Evaluation, Job, Start
from colospec.train.optim import (
    NormLog,
    build_optimizer,
    clip_and_step,
    learning_rate,
    set_learning_rate,
)
from colospec.train.probe import Probe
from colospec.train.probe_target import ProbeTarget
from colospec.train.produce import check_lease
from colospec.train.provenance import plain
from colospec.train.report import Reporter, StepTimes, check_best_metric
from colospec.train.result import write_result
from colospec.train.same_run import check_same_run
from colospec.train.stop import StopRequestedError, StopVote
from colospec.train.warm_up import warm_up
from colospec.world import World

log = logging.getLogger(__name__)


class Trainer:
    """One trainer rank: draft, optimizer, checkpoints and reports.

    Life: construct, `resume`, `warm_up` if there is time, `train`, `finish`. Every call is made by
    all trainer ranks.
    """

    def __init__(self, job: Job, world: World, run_dir: Path) -> None:
        self.job, self.world, self.run_dir = job, world, run_dir
        run, place = job.run, world.place
        torch.manual_seed(run.seed)
        self.draft = build_draft(job, world)
        dtype = compute_dtype(run.trainer.dtype, world.device)
        self.model = shard(self.draft, world_size=place.role_size, dtype=dtype)
        self.optimizer = build_optimizer(self.draft, run.trainer)
        # On the CPU, like every index that is drawn with it.
        self.generator = torch.Generator()
        seed_rng(rank_seed(run.seed, place.role_rank, 0), self.generator)
        # The thread that writes checkpoints needs a group that no training collective uses.
        group = dist.new_group(backend="gloo")
        self.checkpointer = Checkpointer(
            run_dir / "checkpoint",
            group=group,
            rank=place.role_rank,
            world_size=place.role_size,
            keep=run.trainer.keep,
            best_metric=run.trainer.best_metric,
            limit_s=world.limit.checkpoint_s,
        )
        self.position = Start()
        self.last_metrics: dict[str, float] = {}
        """Of the latest report, and of the evaluation of the very same step."""
        self._evaluated: dict[str, float] = {}
        self.times = StepTimes(job.dataset.lengths, world.device)
        self._batch_sums = Sums()
        self._norms = NormLog(run.trainer.max_skipped_steps)

    def resume(self) -> Start:
        """Load the newest good checkpoint, if there is one, and return where to go on."""
        found = self.checkpointer.choose(self._resume_wish())
        if found is None:
            return self.position
        saved = open_checkpoint(found, contents=False).manifest.meta
        check_same_run(self.job.run, saved["run"], self.job.plan.digest, saved["plan"])
        model, optimizer = get_state_dict(self.draft, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "rng": self._rng()}
        meta = self.checkpointer.load(found, state)
        set_state_dict(
            self.draft,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.position = Start(
            meta["epoch"], meta["micro_batch"], meta["step"], meta.get("owes_evaluation", False)
        )
        self.job = self.job.resumed(self.position, meta)
        self.last_metrics = meta["facts"]["metrics"]
        restore_rng(
            state["rng"],
            self.generator,
            rank=self.world.place.role_rank,
            seed=self.job.run.seed,
            step=self.position.step,
        )
        log.info(
            "resume: %s, %d steps done, next is epoch %d, micro-batch %d",
            found, self.position.step, self.position.epoch, self.position.micro_batch,
        )  # fmt: skip
        return self.position

    def warm_up(self) -> None:
        """Do early what a first step does once; the draft and its optimizer stay as they are."""
        began = time.monotonic()
        warm_up(self.draft, self.job, self.position, self.world.device)
        self.optimizer.zero_grad()
        log.debug("warmed up in %.1f s", time.monotonic() - began)

    def _resume_wish(self) -> str:
        """Return run.resume; after a restart by torchrun, this run's own checkpoints come first."""
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if restarted and self.checkpointer.latest() is not None:
            return "auto"
        return self.job.run.resume

    def train(self, source: FeatureSource, target: ProbeTarget) -> bool:
        """Train until the plan ends (True) or somebody asks to stop (False).

        `target` answers the probes of trainer 0.
        """
        reporter = Reporter(self.job, self.world, self.run_dir, self.position)
        self.times.clear()
        with reporter:
            finished = self._work(source, target, reporter)
            self._report(source, reporter)
        if not finished and self.world.place.role_rank == 0:
            target.finish(goes_on=False)
        source.close()
        return finished

    def _work(self, source: FeatureSource, target: ProbeTarget, reporter: Reporter) -> bool:
        run = self.job.run.trainer
        stop = self._ask_to_stop()
        for step, evaluation in self.job.work(self.position):
            if stop.wait_any():
                return False
            stop = self._ask_to_stop()
            self._evaluated = {}
            # The checkpoint of a step whose evaluation comes late has no metrics of it yet.
            saves = step is None
            if step is not None:
                self.step(step, source)
                self.position = Start(step.next_epoch, step.next_micro_batch, step.step + 1)
                self.world.watchdog.beat()
                done = self.position.step
                saves = bool(run.save_interval) and done % run.save_interval == 0
                # A checkpoint is ranked by its own metrics.
                if done % run.log_interval == 0 or done == 1 or saves:
                    self._report(source, reporter)
            if evaluation is not None:
                try:
                    self._evaluate(evaluation, source, target, reporter)
                except StopRequestedError:
                    self.position = replace(self.position, owes_evaluation=True)
                    stop.wait_any()
                    return False
            self.position = replace(self.position, owes_evaluation=False)
            if saves:
                self.world.phase("checkpoint", self.world.limit.checkpoint_s)
                self._save()
                self.world.phase("train", 2 * self.world.limit.step_s)
        stop.wait_any()
        return True

    def finish(self, finished: bool) -> None:
        """Save where training stopped; after the plan's end export the draft and the result."""
        self.world.phase("checkpoint", self.world.limit.checkpoint_s)
        if self.checkpointer.newest_step() != self.position.step:
            self._save()
        self.checkpointer.wait()
        if not finished:
            log.warning(
                "stopped after %d steps, checkpoint saved; go on with run_dir=%s",
                self.position.step, self.run_dir,
            )  # fmt: skip
            return
        self.world.phase("export", self.world.limit.checkpoint_s)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = cast(dict[str, Tensor], get_model_state_dict(self.draft, options=options))
        if self.world.place.role_rank == 0:
            directory = self.run_dir / "export"
            export_draft(
                state,
                directory,
                config=self.job.run.draft,
                target=self.job.target,
                facts=self._facts(),
                format=self.job.run.export.format,
                dtype=getattr(torch, self.job.run.export.dtype.value),
            )
            log.info("draft exported to %s", directory)
            write_result(
                self.run_dir,
                self.job.run.trainer.best_metric,
                self.last_metrics,
                steps=self.position.step,
            )

    def step(self, step: Step, source: FeatureSource) -> None:
        """Make one optimizer step from this trainer's micro-batches of it.

        The host waits for features and for nothing else: no result is read from the device.
        """
        run, times = self.job.run.trainer, self.times
        context = StepContext(
            step=step.step,
            total_steps=self.job.total_steps,
            num_loss_tokens=step.num_loss_tokens,
            generator=self.generator,
        )
        denominator: Tensor | None = None
        batches = list(self.job.micro_batches(step, self.world.place.role_rank))
        times.start(step)
        for index, tokens in enumerate(batches):
            self.model.set_requires_gradient_sync(index == len(batches) - 1)
            lease = source.acquire(timeout_s=self.world.limit.step_s)
            if lease is None:
                raise RuntimeError(f"the engine ended before {tokens.cursor}")
            times.mark("wait")
            with lease:
                check_lease(lease, tokens)
                features = lease.features.to(self.world.device)
                terms = self.draft(FeatureBatch(tokens, features), context)
                times.mark("forward")
                terms.loss.backward()
                times.mark("backward")
            self._batch_sums.add(terms.metrics)
            if terms.denominator is not None:
                part = terms.denominator.to(torch.float32)
                denominator = part if denominator is None else denominator + part
            self.world.watchdog.beat()
            del terms, features
        set_learning_rate(self.optimizer, learning_rate(step.step, self.job.total_steps, run))
        if denominator is not None:
            dist.all_reduce(denominator)
        norm = clip_and_step(self.optimizer, run.max_grad_norm, denominator)
        self._norms.add(step.step, norm)
        self.optimizer.zero_grad()
        times.mark("optimizer")

    def _ask_to_stop(self) -> StopVote:
        return StopVote(self.world.stop_requested)

    def read_metrics(self) -> dict[str, float]:
        """Return the means over all trainers since the last call; waits for the device.

        Raises RuntimeError if gradients were not finite for too many steps in a row.
        """
        return self._batch_sums.fetch(reduce=dist.all_reduce) | self._norms.read()

    def _report(self, source: FeatureSource, reporter: Reporter) -> None:
        if values := self.read_metrics():
            metrics = reporter.report(self.position.step, values, self.times, source)
            check_best_metric(self.job.run.trainer.best_metric, "train", metrics)
            self.last_metrics = metrics | self._evaluated
            self.times.clear()

    def _evaluate(
        self,
        evaluation: Evaluation,
        source: FeatureSource,
        target: ProbeTarget,
        reporter: Reporter,
    ) -> None:
        """Measure on held-out samples, and by real decoding, as far as they are due.

        Raises StopRequestedError, having reported nothing, where somebody asks to stop meanwhile:
        the whole of it follows when the run goes on.
        """
        measured: dict[str, dict[str, float]] = {}

        def keep(group: str, values: dict[str, float]) -> None:
            measured[group] = values
            names = {f"{group}/{name}": value for name, value in values.items()}
            check_best_metric(self.job.run.trainer.best_metric, group, names)

        with self.times.paused():
            if evaluation.bins:
                keep("eval", evaluate(self.job, self.world, self.draft, evaluation, source))
            if evaluation.has_probe:
                self.world.phase("probe", self.world.limit.checkpoint_s)
                keep("probe", self._probe(evaluation, target))
                self.world.phase("train", 2 * self.world.limit.step_s)
            for group, values in measured.items():
                self._evaluated |= reporter.report_evaluation(self.position.step, group, values)
        self.last_metrics = self.last_metrics | self._evaluated

    def _probe(self, evaluation: Evaluation, target: ProbeTarget) -> dict[str, float]:
        directory = self.run_dir / "probe" / f"step-{self.position.step:06d}"
        probe = Probe(self.job, self.world, target, directory, self._facts())
        seen = {name.removeprefix("train/"): value for name, value in self.last_metrics.items()}
        return probe.run(self.draft, evaluation, chain_length=len(accuracies(seen)))

    def _rng(self) -> dict[str, Tensor]:
        return capture_rng(self.generator, rank=self.world.place.role_rank)

    def _save(self) -> None:
        self._norms.check()
        is_fresh = not self.optimizer.state
        model, optimizer = get_state_dict(self.draft, self.optimizer)
        if is_fresh:
            # torch makes the state by a step of zeros, and counts it.
            for value in self.optimizer.state.values():
                value["step"].zero_()
        state = {"model": model, "optimizer": optimizer, "rng": self._rng()}
        meta = {
            "epoch": self.position.epoch,
            "micro_batch": self.position.micro_batch,
            "step": self.position.step,
            "owes_evaluation": self.position.owes_evaluation,
            "plan": self.job.plan.digest,
            "micro_batches_per_step": self.job.micro_batches_per_step,
            "total_steps": self.job.total_steps,
            "run": plain(self.job.run),
            "target": str(self.job.target.path.resolve()),
            "facts": self._facts(),
        }
        self.checkpointer.save(self.position.step, state, meta, metrics=self.last_metrics)

    def _facts(self) -> dict[str, Any]:
        return {
            "steps": self.position.step,
            "data_fingerprint": self.job.dataset.fingerprint,
            "num_samples": self.job.plan.num_samples,
            "metrics": self.last_metrics,
        }
