"""No number of the settings can be set to nonsense that fails later, or never."""

import dataclasses
import types
import typing

import numpy as np
import pytest

from colospec import config
from colospec.config import Mode, RunConfig
from colospec.data.pack import Plan
from colospec.draft import catalog
from colospec.draft.eagle3.config import Eagle3Config

DRAFTS = [algorithm.config for algorithm in catalog.algorithms().values()]


def integers(node, prefix=""):
    """The dotted names of all integer settings."""
    hints = typing.get_type_hints(type(node))
    for item in dataclasses.fields(node):
        value, kind = getattr(node, item.name), hints[item.name]
        if dataclasses.is_dataclass(value):
            yield from integers(value, f"{prefix}{item.name}.")
        elif kind is int or (isinstance(kind, types.UnionType) and int in typing.get_args(kind)):
            yield f"{prefix}{item.name}"


def run_of(draft):
    return RunConfig(mode=Mode.colocate, draft=draft)


def changed(name, value, draft=Eagle3Config):
    run = run_of(draft())
    *groups, last = name.split(".")
    node = run
    for group in groups:
        node = getattr(node, group)
    assert hasattr(node, last)
    setattr(node, last, value)
    return run


@pytest.mark.parametrize(
    ("draft", "name"),
    [(draft, name) for draft in DRAFTS
     for name in sorted(set(integers(run_of(draft()))) - {"seed"})],
)  # fmt: skip
def test_negative_numbers_are_refused_by_name(draft, name):
    with pytest.raises(ValueError, match=rf"{name}=-1\b"):
        config.check(changed(name, -1, draft))


@pytest.mark.parametrize(
    "name",
    [
        "data.max_sequences", "data.token_budget", "data.max_length", "data.min_loss_tokens",
        "draft.ttt_length", "engine.tp", "ring.num_slots", "trainer.accumulation",
        "trainer.epochs", "trainer.max_steps", "trainer.keep",
    ],
)  # fmt: skip
def test_a_run_of_nothing_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name}=0\b"):
        config.check(changed(name, 0))


def test_a_negative_seed_is_refused_by_the_plan():
    one = np.ones(1, np.int64)
    with pytest.raises(ValueError, match="seed=-1"):
        Plan(one, one, seed=-1, token_budget=4, max_sequences=1, fingerprint="")
