"""Which checkpoints stay: the newest ones and the best one."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from colospec.checkpoint.manifest import DamagedError, Found, open_checkpoint, step_of
from colospec.durable import discard

log = logging.getLogger(__name__)


def rotate(directory: Path, *, newest: int, keep: int, best_metric: str) -> None:
    """Remove checkpoints of `directory`, now that the one of step `newest` is committed.

    The newest `keep` stay, and the one with the best finite `best_metric`: the lowest, or the
    highest if the name ends in `_length`. Steps only grow, so checkpoints above `newest` are of a
    past that this run did not continue (it was resumed further back), and go. Damaged ones below it
    are left alone. Raises OSError.
    """
    whole: list[Found] = []
    for path in directory.iterdir():
        step = step_of(path)
        if step is None:
            continue
        if step > newest:
            log.warning("removing %s: this run went on from an earlier step", path)
            discard(path)
            continue
        try:
            whole.append(open_checkpoint(path, contents=False))
        except DamagedError:
            continue
    whole.sort(key=lambda found: found.step, reverse=True)
    best = find_best(whole, best_metric)
    for found in whole[keep:]:
        if found is not best:
            discard(found.path)


def find_best(whole: list[Found], metric: str) -> Found | None:
    """Return the checkpoint with the best finite `metric`, the newest of equals; None without."""
    sign = -1.0 if is_higher_better(metric) else 1.0
    ranked = [
        (sign * value, -found.step, found)
        for found in whole
        if math.isfinite(value := found.manifest.metrics.get(metric, math.nan))
    ]
    return min(ranked, key=lambda entry: entry[:2])[2] if ranked else None


def is_higher_better(metric: str) -> bool:
    """Tell how `trainer.best_metric` is to be read: lengths should grow, all else should fall."""
    return metric.endswith("_length")
