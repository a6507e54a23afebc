"""`limit.*`: how long a rank may take."""

from __future__ import annotations

from dataclasses import dataclass

from colospec.config.ranges import check_numbers


@dataclass
class LimitConfig:
    """Longest time, in seconds, that a rank may spend in a phase before the job is ended."""

    start_s: float = 600.0
    """Until all ranks have joined."""
    load_s: float = 1800.0
    """Until data and models are loaded (the demo target is built in this phase)."""
    step_s: float = 300.0
    """Waiting for the other role; twice as long for a rank that finishes no micro-batch at all."""
    checkpoint_s: float = 900.0
    """Without a committed checkpoint while the end of the run waits for one; for a whole probe."""

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        check_numbers(
            self, prefix="limit.", above_zero=("checkpoint_s", "load_s", "start_s", "step_s")
        )
