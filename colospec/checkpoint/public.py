"""Exported drafts as files: config.json and the checks of tensors, for every public format.

What the formats hold is the algorithms' own (see `draft.public`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import colospec
from colospec.config import DraftConfig
from colospec.draft import registry
from colospec.draft.public import MAPPING
from colospec.target import Target

CONFIG = "config.json"
FLOATS = ("float32", "bfloat16", "float16")


def check_tensors(
    tensors: dict[str, tuple[tuple[int, ...], str]],
    expected: dict[str, tuple[int, ...]],
    where: str,
) -> None:
    """Compare (shape, torch's name of the dtype) by tensor name with the expected shapes.

    Raises ValueError that lists all missing, unexpected and wrong tensors.
    """
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    faults = [f"missing: {', '.join(missing)}"] if missing else []
    faults += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
    for name in sorted(expected.keys() & tensors.keys()):
        shape, dtype = tensors[name]
        if shape != expected[name]:
            faults.append(f"{name} has shape {list(shape)}, expected {list(expected[name])}")
        dtypes = (MAPPING[name],) if name in MAPPING else FLOATS
        if dtype not in dtypes:
            faults.append(f"{name} has dtype {dtype}, expected {' or '.join(dtypes)}")
    if faults:
        raise ValueError(f"{where} is not the draft of this target; {'; '.join(faults)}")


def check_values(tensors: dict[str, Tensor], where: str) -> None:
    """Raise ValueError for NaN or Inf, and for a vocabulary mapping that contradicts itself."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} has NaN or Inf in {tensor.dtype}")
    if "d2t" in tensors:
        offsets, chosen = tensors["d2t"].cpu(), tensors["t2d"].cpu()
        if not torch.equal(torch.arange(len(offsets)) + offsets, chosen.nonzero().flatten()):
            raise ValueError(
                f"{where}: d2t and t2d disagree; draft token i must be target token i + d2t[i], "
                "ascending, and t2d must be True for just these"
            )


def write_config(
    directory: Path, config: DraftConfig, target: Target, dtype: torch.dtype
) -> dict[str, Any]:
    """Write `directory`/config.json and return its contents."""
    form = registry.find(config.algorithm).public
    fields = form.config_fields(config, target)
    name = str(dtype).removeprefix("torch.")
    contents = {
        "architectures": [form.architectures[0]],
        **fields,
        "dtype": name,
        "torch_dtype": name,
        "colospec": {"version": colospec.__version__, **fields["colospec"]},
    }
    (directory / CONFIG).write_text(json.dumps(contents, indent=2) + "\n")
    return contents


def read_config(directory: Path, target: Target) -> DraftConfig:
    """Read `directory`/config.json as a draft for `target`.

    Raises ValueError if it is none, or is one for another target, listing what differs.
    """
    file = directory / CONFIG
    try:
        contents = json.loads(file.read_text())
        architectures = contents.get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    algorithm = registry.find_architecture(name) if isinstance(name, str) else None
    if algorithm is None:
        known = ", ".join(registry.architectures())
        raise ValueError(f"{file} has architectures={architectures}, expected one of {known}")
    form = algorithm.public
    try:
        config = form.read_config(contents)
        found = form.facts(contents)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as {name}: {error}") from error
    different = [
        f"{key} {found[key]}, expected {value}"
        for key, value in form.target_facts(target).items()
        if found.get(key, value) != value
    ]
    if different:
        raise ValueError(f"{file} is for another target than {target.path}: {'; '.join(different)}")
    return config
