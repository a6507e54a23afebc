"""Which draft algorithms there are, and their settings: known without importing torch.

An algorithm of colospec is a folder beside this file whose package holds an `ALGORITHM`. One of
another distribution is an entry point of the group `colospec.draft` that names such a package: its
`draft=NAME` needs nothing in this repository.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from hydra.core.config_store import ConfigStore

import colospec.draft
from colospec.config import CONF_DIR, DraftConfig

GROUP = "colospec.draft"


@dataclass(frozen=True)
class Algorithm:
    """config: its settings, importable without torch; model: "module:class" of its `DraftModel`,
    imported when a draft is built."""

    config: type[DraftConfig]
    model: str


@cache
def algorithms() -> dict[str, Algorithm]:
    """Return all algorithms by name.

    Raises ValueError for two of one name and for a package that cannot be imported.
    """
    folder = colospec.draft
    places = {
        module.name: f"{folder.__name__}.{module.name}"
        for module in pkgutil.iter_modules(folder.__path__)
        if module.ispkg
    }
    found = {
        name: package.ALGORITHM
        for name, place in sorted(places.items())
        if hasattr(package := importlib.import_module(place), "ALGORITHM")
    }
    for point in entry_points(group=GROUP):
        if point.name in found:
            raise ValueError(
                f"the entry point {point.name} = {point.value} (group {GROUP}) has the name of "
                "another draft algorithm; rename it"
            )
        found[point.name] = _plug_in(point.name, point.value)
    return found


def find(name: str) -> Algorithm:
    """Return the algorithm `name`; raises ValueError listing those that exist."""
    known = algorithms()
    if name not in known:
        raise ValueError(
            f"draft.algorithm={name} is unknown; choose one of {', '.join(sorted(known))}"
        )
    return known[name]


def choices() -> list[str]:
    """Return the names that draft= accepts."""
    files = (path.stem for path in (CONF_DIR / "draft").glob("*.yaml"))
    return sorted({*files, *algorithms()})


def register() -> None:
    """Make the settings of all algorithms known to Hydra.

    base_NAME is what conf/draft/NAME.yaml names in its defaults list. An algorithm without such a
    file is chosen with its defaults by its name.
    """
    store = ConfigStore.instance()
    for name, algorithm in algorithms().items():
        store.store(group="draft", name=f"base_{name}", node=algorithm.config)
        if not (CONF_DIR / "draft" / f"{name}.yaml").is_file():
            store.store(group="draft", name=name, node=algorithm.config)


def _plug_in(name: str, place: str) -> Algorithm:
    try:
        algorithm = importlib.import_module(place).ALGORITHM
    except Exception as error:
        raise ValueError(
            f"the entry point {name} = {place} (group {GROUP}) is no draft algorithm "
            f"({type(error).__name__}: {error}); it must name a package that holds an "
            "ALGORITHM = colospec.draft.catalog.Algorithm(...)"
        ) from error
    if not isinstance(algorithm, Algorithm):
        raise ValueError(
            f"{place}.ALGORITHM is a {type(algorithm).__name__}, expected an Algorithm of "
            "colospec.draft.catalog"
        )
    return algorithm
