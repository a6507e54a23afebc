"""`tracker.*`: where metrics go beside the run's own file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class TrackerName(Enum):
    """Where metrics go beside metrics.jsonl."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


@dataclass
class TrackerConfig:
    name: TrackerName = TrackerName.none
    project: str = "colospec"
