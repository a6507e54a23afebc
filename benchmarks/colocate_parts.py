"""What bench_colocate's ranks measure with: a clock of the device, and a source without a ring."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from colospec.batch import Features, TokenBatch
from colospec.data.pack import Step
from colospec.train.job import Job
from colospec.world import World


class Clock:
    """Waits for the device, and times pieces of its work."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []
        self._host_s = 0.0

    def now(self) -> float:
        """Return the time at which the device has done all that it was given."""
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
        return time.monotonic()

    def mark(self) -> Any:
        """Note this place in the stream."""
        if not self._on_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def add(self, began: Any) -> Any:
        """Count the work since the mark `began`; returns the mark of its end."""
        end = self.mark()
        self._pairs.append((began, end))
        return end

    def wait(self, mark: Any) -> None:
        """Let the host wait until the device gets to `mark`."""
        if self._on_cuda:
            mark.synchronize()

    def total_s(self) -> float:
        """Return the seconds counted, and start again; the device must be done."""
        pairs, self._pairs = self._pairs, []
        if self._on_cuda:
            return sum(a.elapsed_time(b) for a, b in pairs) / 1e3
        return sum(b - a for a, b in pairs)

    def used_gib(self) -> float:
        """Return how much of the device is in use by anybody."""
        if not self._on_cuda:
            return 0.0
        free, total = torch.cuda.mem_get_info(self._device)
        return (total - free) / 2**30


class LoopSource:
    """A FeatureSource that leases one buffer again and again, as the features of what is next."""

    def __init__(self, features: Features) -> None:
        self._features = features
        self.following: deque[TokenBatch] = deque()

    def acquire(self, *, timeout_s: float) -> LoopLease:  # noqa: ARG002
        tokens = self.following.popleft()
        return LoopLease(tokens, first_rows(self._features, tokens.num_tokens))


class LoopLease:
    """Implements `batch.Lease`; there is nothing to give back."""

    def __init__(self, tokens: TokenBatch, features: Features) -> None:
        self.cursor, self.digest, self.features = tokens.cursor, tokens.digest, features

    def release(self) -> None: ...

    def __enter__(self) -> LoopLease:
        return self

    def __exit__(self, *_: object) -> None: ...


class LoopedSteps:
    """Steps of the plan; tells `source` the micro-batches of the one that it hands out."""

    def __init__(self, steps: Iterator[Step], source: LoopSource, job: Job, world: World) -> None:
        self._steps, self._source, self._job = steps, source, job
        self._rank = world.place.role_rank

    def __next__(self) -> Step:
        step = next(self._steps)
        self._source.following.extend(self._job.micro_batches(step, self._rank))
        return step


def first_rows(features: Features, num_tokens: int) -> Features:
    """View the features of `num_tokens` tokens."""
    last = features.last_hidden_states
    return Features(
        features.aux_hidden_states[:num_tokens], None if last is None else last[:num_tokens]
    )
