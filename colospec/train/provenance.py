"""Where a run came from: run.json beside its results."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
import time
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from colospec import durable
from colospec.config import RunConfig

_PACKAGES = ("colospec", "torch", "transformers", "safetensors", "hydra-core", "sglang", "numpy")


def write_provenance(run: RunConfig, run_dir: Path, *, world_size: int, plan: str) -> None:
    """Write `run_dir`/run.json: command, commit, versions, machine and the resolved settings."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "world_size": world_size,
        "plan": plan,
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
        "machine": {"cpu": platform.processor() or platform.machine(), "gpus": gpus},
        "config": plain(run),
    }
    durable.write(run_dir / "run.json", json.dumps(facts, indent=2) + "\n")


def plain(value: Any) -> Any:
    """Turn a config into JSON-ready dicts, enums into their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Return commit and dirtiness of the checkout that this package runs from, if it is one."""
    where = Path(__file__).parent
    try:
        sha = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=where, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"sha": sha, "dirty": bool(status.strip())}
