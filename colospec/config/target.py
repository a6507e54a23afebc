"""`target.*`: the model whose drafts are trained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colospec.config.dtype import Dtype


class Weights(Enum):
    """Where the target's weights come from."""

    pretrained = "pretrained"
    random = "random"


@dataclass
class TargetConfig:
    path: str | None = None
    """Hugging Face directory of the target model, or a repository id that the local Hugging Face
    cache holds; null is the built-in demo target."""
    weights: Weights = Weights.pretrained
    """random runs any target from its config.json alone (benchmarks)."""
    dtype: Dtype = Dtype.auto
    """Type in which the target runs and in which features travel."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model directory. Off unless you ask for it."""
