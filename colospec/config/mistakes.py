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
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return no_setting(cause.full_key, cause.object_type)
    if isinstance(cause, ValidationError) and cause.full_key:
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} is no setting=value that Hydra can read: {_first_line(error)}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        choices = [option for option in error.options if not option.startswith("base_")]
        return f"{group}={name} does not exist; choose from {', '.join(choices)}"
    return str(error) if isinstance(error, HydraException) else _first_line(error)


def refuse_unknown(cfg: DictConfig) -> None:
    """Raise ValueError for a setting that does not exist: `+name=` adds any, and none is read."""
    schema = OmegaConf.get_type(cfg)
    known = (
        {field.name for field in dataclasses.fields(schema)}
        if dataclasses.is_dataclass(schema)
        else set(cfg)
    )
    for key in cfg:
        if key not in known:
            raise ValueError(no_setting(cfg._get_full_key(key), schema))
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            refuse_unknown(node)


def no_setting(full_key: str, schema: Any) -> str:
    """Return the message about the unknown setting `full_key`, whose place is of type `schema`."""
    place, _, name = full_key.rpartition(".")
    names = (
        sorted(field.name for field in dataclasses.fields(schema))
        if dataclasses.is_dataclass(schema)
        else []
    )
    prefix = f"{place}." if place else ""
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        advice = f"did you mean {prefix}{close[0]}?"
    else:
        advice = f"there are {', '.join(prefix + other for other in names)}"
    return f"there is no setting {full_key}; {advice}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
