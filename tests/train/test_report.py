"""Step times on a CPU; those of a GPU are in tests/gpu/test_trainer.py."""

import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from colospec.data.pack import Step
from colospec.train.report import PARTS, StepTimes, time_left


def step(*bins):
    return Step(0, 0, 0, bins, num_loss_tokens=5, next_epoch=0, next_micro_batch=0)


def test_every_part_has_the_time_since_the_mark_before():
    times = StepTimes(np.array([3, 4, 5]), torch.device("cpu"))
    began = time.monotonic()
    for _ in range(2):
        times.start(step((0, 2), ()))
        for number, part in enumerate(PARTS):
            time.sleep(0.002 * (number + 1))
            times.mark(part)
    elapsed = time.monotonic() - began
    parts = times.seconds()
    assert list(parts) == list(PARTS)
    assert all(seconds >= 0.004 * (i + 1) for i, seconds in enumerate(parts.values()))
    assert elapsed - 0.2 < sum(parts.values()) <= elapsed
    assert times.host_wait_s == parts["wait"]
    assert (times.num_steps, times.num_samples, times.num_tokens) == (2, 4, 16)
    times.clear()
    assert sum(times.seconds().values()) == times.host_wait_s == times.num_tokens == 0


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_what_happens_in_a_pause_is_not_in_the_window(error):
    times = StepTimes(np.array([3]), torch.device("cpu"))
    began = times.began
    with suppress(RuntimeError), times.paused():
        time.sleep(0.02)
        if error is not None:
            raise error
    assert 0.02 <= times.began - began <= time.monotonic() - began
    assert sum(times.seconds().values()) == 0


@pytest.mark.parametrize(
    ("left", "done", "seconds", "told"),
    [(10, 0, 0.0, "-"), (10, 4, 30.0, "1m15s"), (0, 4, 30.0, "0m00s"), (-3, 103, 40.0, "0m00s")],
)
def test_time_left_is_told_at_the_pace_so_far(left, done, seconds, told):
    assert time_left(left, done, seconds) == told
