"""What a finished run hands to whoever started it, a sweeper for one: `result.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from colospec import durable
from colospec.checkpoint.rotate import is_higher_better


def write_result(run_dir: Path, name: str, metrics: Mapping[str, float], *, steps: int) -> None:
    """Write `run_dir`/result.json; its `objective` is the metric `name`, lower is better.

    Raises ValueError where `name` was not measured at the end: a run that goes on from its last
    step measures nothing but what it owes.
    """
    if name not in metrics:
        raise ValueError(
            f"the draft of step {steps} is exported, but trainer.best_metric={name} was not "
            "measured there, so there is no result.json; set trainer.best_metric=train/loss, or "
            "train on with more trainer.max_steps"
        )
    result = {
        "objective": -metrics[name] if is_higher_better(name) else metrics[name],
        "objective_name": name,
        "steps": steps,
        "metrics": dict(metrics),
    }
    durable.write(run_dir / "result.json", json.dumps(result, indent=2) + "\n")
