"""The table at the end of a multirun: which settings each job had, and what it reached."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table

from colospec import durable
from colospec.log import console


class SweepSummary(Callback):
    """Collects the jobs of a multirun and prints them, best first. Named in conf/config.yaml."""

    def __init__(self) -> None:
        self._jobs: list[tuple[list[str], float | None, str]] = []
        self._has_failed = False

    def on_job_end(
        self,
        config: DictConfig,
        job_return: JobReturn,
        **_kwargs: Any,
    ) -> None:
        """Keep one job's overrides, objective and directory."""
        value = job_return.return_value if job_return.status is JobStatus.COMPLETED else math.inf
        self._has_failed |= value == math.inf
        objective = float(value) if value is not None and math.isfinite(value) else None
        directory = str(config.hydra.runtime.output_dir)
        self._jobs.append((list(job_return.overrides or ()), objective, directory))

    def on_multirun_end(self, config: DictConfig, **_kwargs: Any) -> None:
        """Print all jobs, with the settings in which they differ; write sweep.json beside them.

        Exits with code 1 if a job failed; the others have run all the same.
        """
        jobs = sorted(self._jobs, key=lambda job: float("inf") if job[1] is None else job[1])
        common = set.intersection(*(set(job[0]) for job in jobs)) if len(jobs) > 1 else set()
        rows = [
            {
                "settings": " ".join(word for word in overrides if word not in common),
                "objective": objective,
                "directory": directory,
            }
            for overrides, objective, directory in jobs
        ]
        table = Table(title="sweep (objective: lower is better)")
        for name in ("objective", "settings", "directory"):
            table.add_column(name, overflow="fold")
        for row in rows:
            value = row["objective"]
            shown = "none" if value is None else f"{value:.4f}"
            table.add_row(shown, str(row["settings"]), str(row["directory"]))
        console.print(table)
        file = Path(config.hydra.sweep.dir) / "sweep.json"
        durable.write(file, json.dumps(rows, indent=2) + "\n")
        console.print(f"written to {file}")
        if self._has_failed:
            sys.exit(1)
