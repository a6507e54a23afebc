"""Draft algorithms by name: their models, imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from torch import Tensor

from colospec.batch import FeatureSpec
from colospec.config import DraftConfig, ExportFormat, Weights
from colospec.draft import catalog
from colospec.draft.base import DraftModel
from colospec.draft.public import PublicFormat
from colospec.target import Target


def find(name: str) -> type[DraftModel]:
    """Return the algorithm `name`; raises ValueError listing those that exist."""
    module, _, attribute = catalog.find(name).model.partition(":")
    model: type[DraftModel] = getattr(importlib.import_module(module), attribute)
    return model


def formats(algorithm: str) -> dict[ExportFormat, PublicFormat]:
    """Return the layouts that drafts of `algorithm` can have outside, by name."""
    kind = find(algorithm)
    return {form.name: form for form in (kind.public, *kind.more_formats)}


def public_format(algorithm: str, name: ExportFormat) -> PublicFormat:
    """Return one of `formats`; raises ValueError listing those that the algorithm has."""
    known = formats(algorithm)
    if name not in known:
        raise ValueError(
            f"export.format={name.value}: draft={algorithm} cannot be written so; choose one of "
            f"{', '.join(form.value for form in known)}"
        )
    return known[name]


def find_format(contents: dict[str, Any]) -> PublicFormat | None:
    """Return the format of a draft with this config.json; None if no algorithm knows it."""
    for algorithm in catalog.algorithms():
        for form in formats(algorithm).values():
            if form.matches(contents):
                return form
    return None


def architectures() -> list[str]:
    """Return all architectures that `find_format` knows."""
    forms = [form for algorithm in catalog.algorithms() for form in formats(algorithm).values()]
    return list(dict.fromkeys(name for form in forms for name in form.architectures))


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
