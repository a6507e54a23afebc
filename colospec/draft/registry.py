"""Draft algorithms by name: their models, imported when they are asked for."""

from __future__ import annotations

import importlib

import numpy as np
from torch import Tensor

from colospec.batch import FeatureSpec
from colospec.config import DraftConfig, Weights
from colospec.draft import catalog
from colospec.draft.base import DraftModel
from colospec.target import Target


def find(name: str) -> type[DraftModel]:
    """Return the algorithm `name`; raises ValueError listing those that exist."""
    module, _, attribute = catalog.find(name).model.partition(":")
    model: type[DraftModel] = getattr(importlib.import_module(module), attribute)
    return model


def find_architecture(name: str) -> type[DraftModel] | None:
    """Return the algorithm whose architecture in config.json is `name`; None if there is none."""
    for algorithm in map(find, catalog.algorithms()):
        if name in algorithm.public.architectures:
            return algorithm
    return None


def architectures() -> list[str]:
    """Return all architectures that `find_architecture` knows."""
    models = map(find, catalog.algorithms())
    return [name for model in models for name in model.public.architectures]


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
