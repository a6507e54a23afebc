"""The JSON record of a benchmark: what its figures come from, and where it is kept."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def parser(about: str, *, tiny: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of --out and --commit, and of --tiny where `tiny` says what that does.

    `about` is the docstring of the benchmark.
    """
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = "write the record here; default: benchmarks/results"
    if tiny is not None:
        made.add_argument("--tiny", action="store_true", help=tiny)
        where += ", but nowhere for --tiny"
    made.add_argument("--out", type=Path, help=where)
    made.add_argument("--commit", help="name the commit, for a tree without .git")
    return made


def origin(named: str | None = None) -> dict[str, Any]:
    """Return what the figures of a record come from; `named` is the commit of --commit."""
    return {
        "machine": machine(),
        "commit": named or commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def machine() -> dict[str, Any]:
    """Describe this host; `cores` are those that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def slug(host: dict[str, Any]) -> str:
    """Return the part of a file's name that stands for this `machine`."""
    return (host["gpu"] or "cpu").lower().replace(" ", "-")


def versions() -> dict[str, str | None]:
    """Return what the figures depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = None
    if shutil.which("nvidia-smi"):
        shown = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        driver = shown.partition("\n")[0].strip() or None
    found: dict[str, str | None] = {"driver": driver}
    for name in ("torch", "triton", "transformers", "sglang"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """Return the checked-out commit, marked if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def write(record: dict[str, Any], arguments: argparse.Namespace, *, name: str | None) -> None:
    """Write to --out, else to results/`name`; nowhere if that is None, or the run a tiny one."""
    out: Path | None = arguments.out
    if out is None and name is not None and not getattr(arguments, "tiny", False):
        out = RESULTS / name
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
