"""What a run says of itself: step times, rates, the console line, the bar, the trackers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from colospec import log as console_log
from colospec.batch import FeatureSource
from colospec.data.pack import Step
from colospec.evaluate.simulate import simulated_acceptance_length
from colospec.metrics import Tracker, open_trackers
from colospec.train.evaluation import accuracies
from colospec.train.job import Job, Start
from colospec.train.provenance import plain
from colospec.world import World

log = logging.getLogger(__name__)
PARTS = ("wait", "forward", "backward", "optimizer")
MAX_EVENTS = 4096
"""Events of a window before they are added up, for which the host waits."""


class StepTimes:
    """Seconds of one trainer's steps by part, and what all trainers' steps held, since the last
    report. `lengths` [samples] are the samples' tokens.

    On CUDA they are seconds of the device, between events in its stream: the host is ahead of it,
    and `wait` is what the device has stood idle for want of features. `host_wait_s` is how long the
    host has waited for features, most of it while the device was busy. On a CPU both are one.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device) -> None:
        self._lengths = lengths
        self._on_cuda = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str | None, torch.cuda.Event]] = []
        self.host_wait_s = 0.0
        self.num_steps = self.num_samples = self.num_tokens = self.num_loss_tokens = 0
        self.began = self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside, which must not be a part of a step, out of the window.

        Waits for the device, which is at steps of the window still.
        """
        if self._on_cuda:
            torch.cuda.synchronize()
        paused = time.monotonic()
        try:
            yield
        finally:
            self.began += time.monotonic() - paused

    def start(self, step: Step) -> None:
        """Begin a step."""
        ids = [sample for bin_ids in step.bins for sample in bin_ids]
        self.num_steps += 1
        self.num_samples += len(ids)
        self.num_loss_tokens += step.num_loss_tokens
        self.num_tokens += int(self._lengths[ids].sum())
        self._last = time.monotonic()
        if self._on_cuda:
            self._record(None)

    def mark(self, part: str) -> None:
        """Count the time since the last mark for `part`."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        if part == "wait":
            self.host_wait_s += elapsed
        if self._on_cuda:
            self._record(part)
        else:
            self._seconds[part] += elapsed

    def seconds(self) -> dict[str, float]:
        """Return the seconds by part. On CUDA the stream must have been waited for, which reading
        any result of the last step does."""
        for (_, before), (part, event) in pairwise(self._events):
            if part is not None:
                self._seconds[part] += before.elapsed_time(event) / 1e3
        self._events = self._events[-1:]
        return dict(self._seconds)

    def _record(self, part: str | None) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((part, event))
        if len(self._events) >= MAX_EVENTS:
            event.synchronize()
            self.seconds()


class Reporter:
    """Prints and stores metrics on trainer 0; silent on the others. A context manager."""

    def __init__(self, job: Job, world: World, run_dir: Path, start: Start) -> None:
        self._job, self._world = job, world
        self._total = job.total_steps
        self._trackers: list[Tracker] = []
        self._progress: Progress | None = None
        # The first report, whose steps compiled kernels and say nothing about those to come.
        self._first: tuple[int, float] | None = None
        if world.place.role_rank == 0:
            run = job.run
            tracker = run.tracker
            self._trackers = open_trackers(
                tracker.name.value, tracker.project, run_dir, plain(run),
                first_step=start.step, owes_evaluation=start.owes_evaluation,
            )  # fmt: skip
            if console_log.is_terminal():
                columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn())
                self._progress = Progress(
                    *columns, TimeRemainingColumn(), console=console_log.console
                )
                self._task = self._progress.add_task("train", total=self._total)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        for tracker in self._trackers:
            tracker.close()

    def report(
        self, step: int, values: dict[str, float], times: StepTimes, source: FeatureSource
    ) -> dict[str, float]:
        """Name the window's means, add rates, write them; return them (on every rank)."""
        metrics = {f"train/{name}": value for name, value in values.items()}
        right = accuracies(values)
        metrics["train/simulated_acceptance_length"] = simulated_acceptance_length(right)
        if self._world.place.role_rank == 0:
            metrics |= self._rates(times, source)
            for tracker in self._trackers:
                tracker.log(step, metrics)
            log.info("%s", self._line(step, metrics, right))
            if self._progress is not None:
                self._progress.update(self._task, completed=step)
        return metrics

    def report_evaluation(
        self, step: int, group: str, values: dict[str, float]
    ) -> dict[str, float]:
        """Name what was measured after `step` steps, write it; return it (on every rank).

        A line of its own: it is the state at a step, not the mean of a window.
        """
        metrics = {f"{group}/{name}": value for name, value in values.items()}
        for tracker in self._trackers:
            tracker.log(step, metrics)
        if group == "eval" and self._world.place.role_rank == 0:
            right = " ".join(f"{value:.2f}" for value in accuracies(values)[:3])
            log.info(
                "eval step %d: loss %.3f  acc %s  sim-accept %.2f",
                step, values["loss"], right, values["simulated_acceptance_length"],
            )  # fmt: skip
        return metrics

    def _rates(self, times: StepTimes, source: FeatureSource) -> dict[str, float]:
        elapsed = max(time.monotonic() - times.began, 1e-9)
        parts = times.seconds()
        busy = max(sum(parts.values()) - parts["wait"], 1e-9)
        rates = {
            "perf/tokens_per_s": times.num_tokens / elapsed,
            "perf/samples_per_s": times.num_samples / elapsed,
            "perf/trainer_tokens_per_s": times.num_tokens / busy,
            "perf/step_s": elapsed / max(times.num_steps, 1),
            "perf/loss_tokens_per_step": times.num_loss_tokens / max(times.num_steps, 1),
        }
        for part, seconds in parts.items():
            rates[f"perf/{part}_s"] = seconds / max(times.num_steps, 1)
        rates["perf/host_wait_s"] = times.host_wait_s / max(times.num_steps, 1)
        if (engines := self._engine_rate()) is not None:
            rates["perf/engine_tokens_per_s"] = engines
        if (fill := getattr(source, "fill", None)) is not None:
            rates["perf/ring_full"] = float(fill)
        if self._world.device.type == "cuda":
            rates["memory/reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return rates

    def _engine_rate(self) -> float | None:
        store = self._world.store
        keys = [f"engine_rate/{rank}" for rank in range(self._job.num_trainers)]
        rates = [float(value) for key in keys if (value := store.peek(key)) is not None]
        return sum(rates) if rates else None

    def _line(self, step: int, metrics: dict[str, float], right: list[float]) -> str:
        def tokens(name: str) -> str:
            return f"{metrics[name] / 1000:.1f}k" if name in metrics else "-"

        parts = [
            f"step {step:5d}/{self._total}",
            f"loss {metrics['train/loss']:.3f}",
            "acc " + " ".join(f"{value:.2f}" for value in right[:3]),
            f"sim-accept {metrics['train/simulated_acceptance_length']:.2f}",
            f"{tokens('perf/tokens_per_s')} tok/s",
            f"engine {tokens('perf/engine_tokens_per_s')}",
            f"trainer {tokens('perf/trainer_tokens_per_s')}",
            f"wait {metrics['perf/wait_s']:.3f}s",
        ]
        if "perf/ring_full" in metrics:
            slots = self._job.run.ring.num_slots
            parts.append(f"ring {metrics['perf/ring_full']:.0f}/{slots}")
        if "memory/reserved_gib" in metrics:
            parts.append(f"mem {metrics['memory/reserved_gib']:.1f} GiB")
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, began = self._first
        left = time_left(self._total - step, step - first, now - began)
        return "  ".join([*parts, f"eta {left}"])


def time_left(num_left: int, num_done: int, seconds: float) -> str:
    """Return how long `num_left` steps take, if they are like `num_done` that took `seconds`.

    The number of a plan's steps is an estimate, and can be past.
    """
    if not num_done:
        return "-"
    left = int(max(num_left, 0) * seconds / num_done)
    return f"{left // 60}m{left % 60:02d}s"


def check_best_metric(name: str, group: str, metrics: Mapping[str, float]) -> None:
    """Raise ValueError, at the first report and not at the end, for a metric that is never there.

    `metrics` are those that a report of `group` has; names of other groups are left to theirs.
    """
    known = sorted(key for key in metrics if key.startswith(f"{group}/"))
    is_ours = name.startswith(f"{group}/") or not name.startswith(("train/", "eval/", "probe/"))
    if is_ours and name not in known:
        raise ValueError(f"trainer.best_metric={name} is no metric; there are {', '.join(known)}")
