"""Measure drafts by real speculative decoding:

python -m colospec.evaluate --target DIR --draft EXPORT_DIR ... --prompts FILE
python -m colospec.evaluate ... --through sglang     # also as it will be served, with speeds
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from colospec import durable
from colospec.checkpoint.export import load_draft
from colospec.config import Dtype
from colospec.data.encode import load_tokenizer
from colospec.evaluate.acceptance import DecodingSettings
from colospec.evaluate.compare import compare
from colospec.evaluate.drafters import open_drafter
from colospec.evaluate.prompts import read_prompts
from colospec.evaluate.target_decoder import TargetDecoder
from colospec.evaluate.through import (
    arguments_of,
    check_machine,
    decode_through_sglang,
    greedily_proposed,
    warn_if_apart,
)
from colospec.log import console, to_console
from colospec.target import Target


def main(arguments: list[str] | None = None) -> None:
    """Decode, print the table, and write the JSON file if asked for."""
    options = _parser().parse_args(arguments)
    to_console()
    try:
        _evaluate(options)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def _evaluate(options: argparse.Namespace) -> None:
    if options.json:
        _check_output(options.json)
    directories = _names(options.draft)
    device = _device(options.device)
    target = Target.load(options.target, dtype=options.dtype)
    if options.through == "sglang":
        check_machine(target, device)
    prompts = read_prompts(
        options.prompts,
        load_tokenizer(target.path),
        num_prompts=options.num_prompts,
        prompt_tokens=options.prompt_tokens,
    )
    # In the dtype in which engines serve them.
    models = {
        name: load_draft(path, target).to(device, target.dtype)
        for name, path in directories.items()
    }
    drafters = {name: open_drafter(model, target) for name, model in models.items()}
    decoder = TargetDecoder(target, device=device, trust_remote_code=options.trust_remote_code)
    settings = DecodingSettings(
        max_new_tokens=options.max_new_tokens,
        chain_length=options.chain_length,
        temperature=options.temperature,
        seed=options.seed,
    )
    drafting = (
        {
            name: arguments_of(model, directories[name], settings.chain_length)
            for name, model in models.items()
        }
        if options.through == "sglang"
        else {}
    )
    comparison = compare(decoder, drafters, prompts, settings)
    console.print(comparison.table())
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    report = {"settings": asked, **comparison.to_dict()}
    _write(report, options.json)
    if drafting:
        sampled = {
            name: greedily_proposed(decoder, drafter, prompts, settings)
            for name, drafter in drafters.items()
        }
        # The decoder's hooks know it: only the collector frees its GPU memory, which SGLang needs.
        del decoder, drafters, models
        gc.collect()
        torch.cuda.empty_cache()
        served = decode_through_sglang(
            target,
            drafting,
            prompts,
            settings,
            device=device,
            batch_sizes=options.batch_sizes,
            trust_remote_code=options.trust_remote_code,
        )
        for name, one in served:
            real = comparison.drafters[name].greedy
            console.print(one.table(name, real, sampled[name]))
            warn_if_apart(name, one, real)
            report["drafters"][name]["through_sglang"] = one.to_dict(real, sampled[name])
            _write(report, options.json)
    if options.json:
        console.print(f"wrote {options.json}")


def _device(name: str) -> torch.device:
    """Raise ValueError for one that this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}; --device cpu") from error
    return device


def _check_output(file: Path) -> None:
    """Raise ValueError, before minutes are spent, where the report could not be written."""
    if not file.parent.is_dir():
        raise ValueError(
            f"--json {file}: there is no directory {file.parent}; mkdir -p {file.parent}"
        )
    if file.exists() and not file.is_file():
        raise ValueError(f"--json {file} is no regular file; the table is printed without --json")
    directory = file.resolve().parent
    if not os.access(directory, os.W_OK):
        raise ValueError(f"--json {file}: you may not write in {directory}; choose another file")


def _write(report: dict[str, Any], file: Path | None) -> None:
    """Keep what is measured so far: what follows takes minutes, and may fail."""
    if file is not None:
        durable.write(file.resolve(), json.dumps(report, indent=2, default=str) + "\n")


def _names(paths: list[Path]) -> dict[str, Path]:
    """Name each directory by its last parts, as many as tell it from the others."""
    rows = [path.resolve().parts for path in paths]
    for length in range(1, 1 + max(map(len, rows))):
        named = {"/".join(row[-length:]): path for row, path in zip(rows, paths, strict=True)}
        if len(named) == len(paths):
            return named
    raise ValueError(f"--draft {' '.join(map(str, paths))}: the same directory twice")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m colospec.evaluate",
        description="Measure the real acceptance length of drafts by speculative decoding.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = DecodingSettings()
    add = parser.add_argument
    add("--target", type=Path, required=True, help="Hugging Face directory of the target")
    add(
        "--draft", type=Path, nargs="+", required=True, metavar="DIR",
        help="exported draft directories, measured on the same prompts",
    )  # fmt: skip
    add("--prompts", type=Path, required=True, help="rows with prompt, text or messages")
    add("--num-prompts", type=int, default=32, help="how many of them")
    add("--prompt-tokens", type=int, default=64, help="how much of a text row is prompt")
    add("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="per prompt")
    add("--chain-length", type=int, default=defaults.chain_length, help="proposals per step")
    add("--temperature", type=float, default=0.0, help="above 0: also sample at it")
    add("--seed", type=int, default=defaults.seed, help="of the sampling")
    add("--dtype", choices=[one.value for one in Dtype], default="auto", help="of the target")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--through", choices=("loop", "sglang"), default="loop", help="sglang: also as served")
    add("--batch-sizes", type=_sizes, default="1,8,32", help="prompts at a time in SGLang")
    add("--trust-remote-code", action="store_true", help="run code of the target's directory")
    add("--json", type=Path, default=None, help="write all numbers to this file")
    return parser


def _sizes(text: str) -> list[int]:
    """Parse "1,8,32"."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text} must be numbers from 1, like 1,8,32")
    return [int(part) for part in parts]


if __name__ == "__main__":
    main()
