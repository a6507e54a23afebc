"""How long device work takes, how much memory it needs, and which kernels it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from colospec.draft.kernels import choice

GIB = 1 << 30


SERIES = 3


@dataclass(frozen=True)
class Effort:
    """Up to `repeats` calls in each of three series, as many as fit into `limit_s` seconds in
    all."""

    repeats: int
    limit_s: float


@contextmanager
def path(name: str) -> Iterator[None]:
    """Choose the kernels where they exist, or force the plain path."""
    original = choice.fused
    if name == "plain":
        choice.fused = lambda _: False
    try:
        yield
    finally:
        choice.fused = original


def seconds(run: Callable[[], object], device: torch.device, effort: Effort | None) -> float:
    """Time of `run`: of its second call, or the median of further series, several calls at once as
    in training. The device is waited for around a series and never inside."""
    run()
    once = _elapsed(run, device, 1)
    if effort is None:
        return once
    count = max(1, min(effort.repeats, int(effort.limit_s / SERIES / once)))
    return statistics.median(_elapsed(run, device, count) for _ in range(SERIES))


def peak_gib(run: Callable[[], Any], device: torch.device) -> tuple[Any, float | None]:
    """Result of one call, and the peak of allocated memory over it, weights included."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats()
    result = run()
    return result, torch.cuda.max_memory_allocated() / GIB


def slowest(
    run: Callable[[], object], device: torch.device, count: int = 25
) -> list[dict[str, Any]]:
    """Device kernels of one call by their total time."""
    if device.type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        _synchronize(device)
    kernels = [
        {"name": event.key[:90], "calls": event.count, "ms": event.self_device_time_total / 1e3}
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(kernels, key=lambda kernel: -kernel["ms"])[:count]


def _elapsed(run: Callable[[], object], device: torch.device, count: int) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
