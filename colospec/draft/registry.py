"""Draft algorithms by name. A new one is a module with a `DraftModel`, and one line here."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from colospec.batch import FeatureSpec
from colospec.config import DraftConfig, Weights
from colospec.draft.base import DraftModel
from colospec.draft.dflash import DFlash
from colospec.draft.eagle3 import Eagle3
from colospec.target import Target

ALGORITHMS: dict[str, type[DraftModel]] = {
    "dflash": DFlash,
    "eagle3": Eagle3,
}


def find(name: str) -> type[DraftModel]:
    """Return the algorithm `name`; raises ValueError listing those that exist."""
    if name not in ALGORITHMS:
        raise ValueError(
            f"draft.algorithm={name} is unknown; choose one of {', '.join(sorted(ALGORITHMS))}"
        )
    return ALGORITHMS[name]


def find_architecture(name: str) -> type[DraftModel] | None:
    """Return the algorithm whose architecture in config.json is `name`; None if there is none."""
    for algorithm in ALGORITHMS.values():
        if name in algorithm.public.architectures:
            return algorithm
    return None


def architectures() -> list[str]:
    """Return all architectures that `find_architecture` knows."""
    return [name for kind in ALGORITHMS.values() for name in kind.public.architectures]


def features(config: DraftConfig, target: Target) -> FeatureSpec:
    """Return what the draft of `config` needs from the target."""
    return find(config.algorithm).features(config, target)


def build(
    config: DraftConfig,
    target: Target,
    *,
    token_counts: np.ndarray | Tensor | None,
    weights: Weights = Weights.pretrained,
) -> DraftModel:
    """Build the draft of `config` on the CPU, in float32, with the target's frozen weights loaded.

    `token_counts` [V] counts the supervised tokens of the data; None will do where the draft keeps
    the target's vocabulary. Fresh weights come from torch's global generator: seed it alike on all
    trainers.

    Raises ValueError for an unknown algorithm and for settings that do not fit the target.
    """
    model = find(config.algorithm).from_config(config, target, token_counts=token_counts)
    model.load_target(target, weights=weights)
    return model
