"""Exported drafts as files: config.json and the checks of tensors, for every public format.

What the formats hold is the algorithms' own (see `draft.public`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import colospec
from colospec.checkpoint.manifest import MANIFEST
from colospec.config import DraftConfig
from colospec.draft import registry
from colospec.draft.public import MAPPING, SPECULATORS_KEY, PublicFormat
from colospec.draft.rope import rope_difference
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
        # The least and the largest are NaN if any is: forty times as fast as to ask them all.
        if tensor.is_floating_point() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            raise ValueError(f"{where}: {name} has NaN or Inf in {tensor.dtype}")
    if "d2t" in tensors:
        offsets, chosen = tensors["d2t"].cpu(), tensors["t2d"].cpu()
        if not torch.equal(torch.arange(len(offsets)) + offsets, chosen.nonzero().flatten()):
            raise ValueError(
                f"{where}: d2t and t2d disagree; draft token i must be target token i + d2t[i], "
                "ascending, and t2d must be True for just these"
            )


def may_be_absent(form: PublicFormat, names: Iterable[str]) -> set[str]:
    """Return the tensors that a file with these tensors may lack: its mask of the vocabulary where
    it has the offsets, its head where that is the target's whole one."""
    follows = {"t2d"} if "d2t" in set(names) else {"lm_head.weight"}
    return (follows & form.may_lack) - set(names)


def complete_mapping(tensors: dict[str, Tensor], vocab_size: int, where: str) -> None:
    """Give a pruned vocabulary its mask t2d if it is missing, and its d2t as offsets if the mask
    shows that it holds token ids. Raises ValueError for tokens outside the vocabulary."""
    d2t = tensors["d2t"]
    places = torch.arange(len(d2t))
    if "t2d" not in tensors:
        ids = d2t + places
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise ValueError(f"{where}: d2t leads outside the target's {vocab_size} tokens")
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        tensors["t2d"][ids] = True
    elif torch.equal(d2t, chosen := tensors["t2d"].nonzero().flatten()):
        tensors["d2t"] = chosen - places


def write_config(
    directory: Path, form: PublicFormat, config: DraftConfig, target: Target, dtype: torch.dtype
) -> dict[str, Any]:
    """Write `directory`/config.json and return its contents."""
    fields = form.config_fields(config, target)
    name = str(dtype).removeprefix("torch.")
    dtypes = {"dtype": name, "torch_dtype": name}
    if "transformer_layer_config" in fields:
        fields["transformer_layer_config"] |= dtypes
    contents = {
        "architectures": [form.architectures[0]],
        **fields,
        **dtypes,
        "colospec": {"version": colospec.__version__, **fields["colospec"]},
    }
    (directory / CONFIG).write_text(json.dumps(contents, indent=2) + "\n")
    return contents


def read_config(directory: Path, target: Target) -> DraftConfig:
    """Return the settings of `read_public`."""
    return read_public(directory, target)[0]


def read_public(directory: Path, target: Target) -> tuple[DraftConfig, PublicFormat]:
    """Read `directory`/config.json as a draft for `target`; return its settings and its format.

    Raises ValueError if it is none, or is one for another target, listing what differs.
    """
    file = directory / CONFIG
    contents, form = read_format(directory)
    try:
        config = form.read_config(contents)
        config.check()
        facts = form.facts(contents)
        rope = rope_difference(facts, target)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as {form.architectures[0]}: {error}") from error
    different = [
        f"{key} {facts[key]}, expected {value}"
        for key, value in form.target_facts(target).items()
        if facts.get(key, value) != value
    ]
    different += [rope] if rope else []
    if different:
        raise ValueError(f"{file} is for another target than {target.path}: {'; '.join(different)}")
    return config, form


def read_format(directory: Path) -> tuple[dict[str, Any], PublicFormat]:
    """Return the contents of `directory`/config.json and the format that they are of.

    Raises ValueError if no draft algorithm knows it.
    """
    file = directory / CONFIG
    if not file.is_file():
        raise ValueError(f"{directory} is no exported draft: no {CONFIG} in it{_advice(directory)}")
    try:
        contents = json.loads(file.read_text())
        architectures, kind = contents.get("architectures"), contents.get(SPECULATORS_KEY)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    form = registry.find_format(contents)
    if form is None:
        known = ", ".join(registry.architectures())
        found = f"architectures={architectures}" + (f", {SPECULATORS_KEY}={kind}" if kind else "")
        raise ValueError(f"{file} has {found}, expected one of {known}")
    return contents, form


def _advice(directory: Path) -> str:
    """Return what to type where `directory` is something else that a run has made."""
    if (directory / MANIFEST).is_file():
        return (
            "; it is a checkpoint: export it with `python -m colospec.checkpoint.export "
            f"{directory} out_dir`, and give out_dir"
        )
    if (directory / "export" / CONFIG).is_file():
        return f"; it is a run directory: give {directory / 'export'}"
    return ""
