"""Metrics as sums and counts, and the places they are written to."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from colospec import durable


class Sums:
    """Running (sum, count) pairs, kept on the device; divided only when they are fetched."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: Tensor | None = None

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add name -> (sum, count), both scalars. Every call must bring the same names."""
        names = sorted(metrics)
        pairs = [torch.stack([part.double() for part in metrics[name]]) for name in names]
        values = torch.stack(pairs)
        if self._values is None:
            self._names, self._values = names, values
        elif names != self._names:
            raise ValueError(f"metrics changed from {self._names} to {names}")
        else:
            self._values += values

    def fetch(self, reduce: Any = None) -> dict[str, float]:
        """Return name -> mean and start again. `reduce` sums the [names, 2] tensor over ranks."""
        if self._values is None:
            return {}
        if reduce is not None:
            reduce(self._values)
        sums, counts = self._values.cpu().unbind(1)
        means = (sums / torch.where(counts > 0, counts, 1.0)).tolist()
        self._values = None
        return dict(zip(self._names, means, strict=True))


class Tracker(Protocol):
    """Where one line of metrics goes."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonlTracker:
    """Appends one JSON object per logged step to metrics.jsonl; always on."""

    def __init__(self, path: Path, *, first_step: int, owes_evaluation: bool = False) -> None:
        # Lines past the checkpoint that a resumed run starts from will be written again.
        kept = []
        if path.is_file():
            kept = [
                line
                for line in path.read_text().splitlines()
                if (step := _step(line)) < first_step
                or (step == first_step and not (owes_evaluation and _is_evaluation(line)))
            ]
        durable.write(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write {"step": ..., "time": unix seconds, **values}; JSON has no NaN, so that is null."""
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step(line: str) -> float:
    """Return the step of a line; infinity for one that a killed run or a full disk cut short."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


def _is_evaluation(line: str) -> bool:
    return any(name.startswith(("eval/", "probe/")) for name in json.loads(line))


class TensorboardTracker:
    """Writes scalars for TensorBoard (extra `tensorboard`)."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write all values at `step`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbTracker:
    """Sends values to Weights & Biases (extra `wandb`)."""

    def __init__(self, directory: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=project, dir=directory, config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send all values at `step`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_trackers(
    name: str,
    project: str,
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    first_step: int,
    owes_evaluation: bool = False,
) -> list[Tracker]:
    """Open metrics.jsonl and the tracker chosen by `name`, after `first_step` steps.

    `owes_evaluation`: what was measured after the last of them is measured once more.
    Raises RuntimeError with the install command if its package is missing.
    """
    rows = JsonlTracker(
        run_dir / "metrics.jsonl", first_step=first_step, owes_evaluation=owes_evaluation
    )
    trackers: list[Tracker] = [rows]
    try:
        if name == "tensorboard":
            trackers.append(TensorboardTracker(run_dir / "tensorboard"))
        elif name == "wandb":
            trackers.append(WandbTracker(run_dir, project, config))
    except ImportError as error:
        raise RuntimeError(f"tracker={name}: {error}; pip install 'colospec[{name}]'") from error
    return trackers
