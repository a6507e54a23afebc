"""`topology.*`: which GPUs the ranks get."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TopologyConfig:
    gpus: list[int] | None = None
    """Which GPUs of a node to use, by index; all that the ranks need, from 0, if null."""
