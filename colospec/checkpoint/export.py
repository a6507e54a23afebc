"""Export a draft as the Hugging Face directory that SGLang and vLLM load, and load one back.

    python -m colospec.checkpoint.export CHECKPOINT_DIR OUT_DIR [--format speculators]

An export is written beside its place, checked tensor by tensor, read back, compared bit by bit and
renamed, so that OUT_DIR is a whole model at any time or not there. Only safetensors and JSON are
read and written.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from colospec.checkpoint.card import model_card
from colospec.checkpoint.manifest import DamagedError, open_checkpoint
from colospec.checkpoint.public import (
    CONFIG,
    FLOATS,
    check_tensors,
    check_values,
    complete_mapping,
    may_be_absent,
    read_config,
    read_format,
    write_config,
)
from colospec.checkpoint.state import load_model
from colospec.config import DraftConfig, ExportFormat
from colospec.draft import catalog, registry
from colospec.draft.base import DraftModel
from colospec.draft.public import PublicFormat, Shapes
from colospec.durable import TEMPORARY, publish, restore
from colospec.target import Target

WEIGHTS = "model.safetensors"
_DTYPE_NAMES = {
    "BOOL": "bool", "I64": "int64", "F32": "float32", "BF16": "bfloat16", "F16": "float16",
}  # fmt: skip
log = logging.getLogger(__name__)


def export_draft(
    state: dict[str, Tensor],
    directory: Path,
    *,
    config: DraftConfig,
    target: Target,
    facts: dict[str, Any],
    format: ExportFormat = ExportFormat.sglang,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the draft with the weights `state` to `directory`, replacing an export there.

    `state` is the whole state dict of the draft module (full tensors, any device); floating-point
    tensors are written as `dtype`; `facts` (JSON) go on the model card. Raises ValueError if the
    draft cannot be written in `format` or the tensors are not its own, RuntimeError if the disk
    fails.
    """
    form = registry.public_format(config.algorithm, format)
    form.check(config)
    shapes = form.tensor_shapes(config, target)
    kinds = {name: (tuple(t.shape), str(t.dtype)[len("torch.") :]) for name, t in state.items()}
    check_tensors(kinds, shapes, "the state to export")
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in state.items()
    }
    check_values(tensors, "the state to export")
    aux_layer_ids = registry.features(config, target).aux_layer_ids
    if format is ExportFormat.sglang and target.num_layers - 1 in aux_layer_ids:
        log.warning(
            "this draft reads the last layer of %s, which SGLang does not capture; it can be "
            "evaluated here and served by vLLM", target.path,
        )  # fmt: skip
    with _replacing(directory) as temporary:
        contents = write_config(temporary, form, config, target, dtype)
        card = model_card(target, contents["dtype"], form.card(contents), facts)
        (temporary / "README.md").write_text(card)
        named = {form.file_name(name): tensor for name, tensor in tensors.items()}
        save_file(named, temporary / WEIGHTS, metadata={"format": "pt"})
        _compare(tensors, read_tensors(temporary / WEIGHTS, shapes, form))


def load_draft(directory: Path, target: Target) -> DraftModel:
    """Build the draft of an exported directory, on the CPU, in float32, with the target's weights.

    Raises ValueError if it is not a draft for `target`, listing what differs.
    """
    config = read_config(directory, target)
    # Placeholder counts: the file's own mapping overwrites the vocabulary chosen from them.
    model = registry.build(config, target, token_counts=torch.zeros(target.vocab_size))
    load_weights(model, directory)
    return model


def load_weights(draft: DraftModel, directory: Path) -> None:
    """Overwrite the weights, and the vocabulary mapping, of `draft` by those of an export.

    Tensors that its format may lack keep their values. Raises ValueError if the file is damaged or
    its tensors are not those of `draft`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    state = read_tensors(directory / WEIGHTS, shapes, read_format(directory)[1])
    draft.load_state_dict(draft.state_dict() | state)


def read_tensors(file: Path, shapes: Shapes, form: PublicFormat) -> dict[str, Tensor]:
    """Read a safetensors file of `form` that must hold just these tensors, by our names.

    The target's own tensors are left out. The header is checked before anything is allocated.
    Raises ValueError naming the file and listing all that is missing, unexpected or wrong.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            names = {
                ours: name
                for name in weights.keys()  # noqa: SIM118
                if (ours := form.tensor_name(name))
            }
            slices = {ours: weights.get_slice(name) for ours, name in names.items()}
            kinds = {
                name: (tuple(part.get_shape()), _DTYPE_NAMES.get(code := part.get_dtype(), code))
                for name, part in slices.items()
            }
            absent = may_be_absent(form, names.keys())
            wanted = {name: shape for name, shape in shapes.items() if name not in absent}
            check_tensors(kinds, wanted, str(file))
            tensors = {ours: weights.get_tensor(name) for ours, name in names.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    if "t2d" in shapes:
        complete_mapping(tensors, shapes["t2d"][0], str(file))
    check_values(tensors, str(file))
    return tensors


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """Give a temporary directory that takes the place of `directory` if the body succeeds."""
    restore(directory)
    if directory.exists() and not _may_replace(directory):
        raise ValueError(
            f"{directory} exists and is not a draft that colospec exported, so it is not replaced; "
            "choose another directory"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f"{directory.name}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        publish(temporary, directory)
    except (OSError, SafetensorError) as error:
        written = sum(file.stat().st_size for file in temporary.glob("*"))
        free = shutil.disk_usage(directory.parent).free
        raise RuntimeError(
            f"the draft was not exported to {directory}: {error}. {written:,} bytes were written "
            f"and {free:,} are free on that disk; free some space and export the checkpoint again: "
            "python -m colospec.checkpoint.export CHECKPOINT_DIR OUT_DIR"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _may_replace(directory: Path) -> bool:
    if directory.is_dir() and not any(directory.iterdir()):
        return True
    try:
        return "colospec" in json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError):
        return False


def _compare(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    for name, tensor in written.items():
        if tensor.dtype != read[name].dtype or not torch.equal(tensor, read[name]):
            raise OSError(f"{name} reads back different from what was written")


def _export_checkpoint(args: argparse.Namespace) -> None:
    """Export a saved step, on one process, whatever the number of trainers was."""
    try:
        found = open_checkpoint(args.checkpoint)
    except DamagedError as error:
        raise ValueError(
            f"{args.checkpoint} is not a whole checkpoint (name a directory like "
            f"run_dir/checkpoint/step-000500): {error}"
        ) from error
    meta = found.manifest.meta
    run = meta["run"]
    target = Target.load(args.target or meta["target"], dtype=run["target"]["dtype"])
    schema = OmegaConf.structured(catalog.find(run["draft"]["algorithm"]).config)
    config = OmegaConf.to_object(OmegaConf.merge(schema, run["draft"]))
    assert isinstance(config, DraftConfig)
    export_draft(
        load_model(found.path),
        args.directory,
        config=config,
        target=target,
        facts={**meta.get("facts", {}), "step": found.step, "metrics": found.manifest.metrics},
        format=ExportFormat(args.format or run["export"]["format"]),
        dtype=getattr(torch, args.dtype or run["export"]["dtype"]),
    )
    log.info("step %d exported to %s", found.step, args.directory)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a wrong input ends it with one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m colospec.checkpoint.export",
        description="Export a checkpoint as the directory that SGLang and vLLM load.",
    )
    parser.add_argument("checkpoint", type=Path, help="run_dir/checkpoint/step-NNNNNN")
    parser.add_argument("directory", type=Path, help="where to write the draft model")
    parser.add_argument(
        "--format",
        choices=[form.value for form in ExportFormat],
        help="sglang (vLLM reads it too) or speculators; default: the run's export.format",
    )
    parser.add_argument(
        "--dtype", choices=FLOATS, help="of the weights; default: the run's export.dtype"
    )
    parser.add_argument("--target", type=Path, help="the target model, if it has been moved")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _export_checkpoint(args)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
