"""The table at the end of a multirun: which settings each job had, and what it reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table

from colospec.log import console


class SweepSummary(Callback):
    """Collects the jobs of a multirun and prints them, best first. Named in conf/config.yaml."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, float | None, str]] = []

    def on_job_end(
        self,
        config: DictConfig,  # noqa: ARG002
        job_return: JobReturn,
        **_kwargs: Any,
    ) -> None:
        """Keep one job's overrides, objective and directory."""
        overrides = " ".join(job_return.overrides or ())
        objective = None
        if job_return.status is JobStatus.COMPLETED and job_return.return_value is not None:
            objective = float(job_return.return_value)
        self._rows.append((overrides, objective, str(job_return.working_dir)))

    def on_multirun_end(self, config: DictConfig, **_kwargs: Any) -> None:
        """Print all jobs and write sweep.json beside their directories."""
        directory = Path(config.hydra.sweep.dir)
        table = Table(title="sweep (lower is better)")
        for name in ("objective", "settings", "directory"):
            table.add_column(name, overflow="fold")
        rows = sorted(self._rows, key=lambda row: float("inf") if row[1] is None else row[1])
        for overrides, objective, where in rows:
            shown = "failed" if objective is None else f"{objective:.4f}"
            table.add_row(shown, overrides, where)
        console.print(table)
        facts = [dict(zip(("overrides", "objective", "directory"), r, strict=True)) for r in rows]
        (directory / "sweep.json").write_text(json.dumps(facts, indent=2) + "\n")
        console.print(f"written to {directory}/sweep.json")
