"""Say what is wrong with a command line, in our words: Hydra advises to add unknown settings."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, ValidationError
from omegaconf.errors import ConfigAttributeError, ConfigKeyError


def explain(error: Exception) -> str:
    """Return what a user should read of an error of Hydra or OmegaConf."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and dataclasses.is_dataclass(
        cause.object_type
    ):
        return _no_setting(str(cause.full_key), cause.object_type)
    if isinstance(cause, ValidationError) and cause.full_key:
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} is no setting=value that Hydra can read: {_first_line(error)}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        choices = [option for option in error.options if not option.startswith("base_")]
        return f"{group}={name} does not exist; choose from {', '.join(choices)}"
    return str(error) if isinstance(error, HydraException) else _first_line(error)


def refuse_unknown(cfg: DictConfig, place: str = "") -> None:
    """Raise ValueError for a setting that does not exist: `+name=` adds any, and none is read.

    `place` is the prefix of the names in `cfg`. Where the schema has a dict, anything may stand.
    """
    schema = OmegaConf.get_type(cfg)
    for key in map(str, cfg):
        name = f"{place}{key}"
        if dataclasses.is_dataclass(schema) and key not in _names(schema):
            raise ValueError(_no_setting(name, schema))
        if not OmegaConf.is_interpolation(cfg, key) and isinstance(cfg[key], DictConfig):
            refuse_unknown(cfg[key], f"{name}.")


def _no_setting(full_key: str, schema: Any) -> str:
    """Return the message about the unknown setting `full_key`, whose place is of type `schema`."""
    place, dot, name = full_key.rpartition(".")
    names = _names(schema)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        advice = f"did you mean {place}{dot}{close[0]}?"
    else:
        advice = f"there are {', '.join(place + dot + other for other in names)}"
    return f"there is no setting {full_key}; {advice}"


def _names(schema: Any) -> list[str]:
    return sorted(field.name for field in dataclasses.fields(schema))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
