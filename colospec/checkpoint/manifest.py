"""manifest.json: what a checkpoint directory must hold, byte for byte, and where the run stood.

A checkpoint is the directory `step-000120` (120 completed optimizer steps) with the files of
torch.distributed.checkpoint and a manifest, which is written last:

    {"sha256": of the rest as sorted compact JSON,
     "manifest": {"format": 1, "step": 120, "files": {name: {"size": bytes, "sha256": hex}},
                  "meta": {...}, "metrics": {...}}}

A checkpoint counts only if its manifest and every file that it names are whole. The trust ends
there: the `.metadata` file of torch.distributed.checkpoint is a pickle, so load only checkpoints
that you made yourself. What others give you comes as safetensors, through `export`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
MAX_READERS = 8
_STEP = re.compile(r"step-(\d{6,})")
log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A directory is no whole checkpoint; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Read the file and return its facts. Raises OSError."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return cls(file.tell(), digest.hexdigest())


def read_facts(paths: list[Path]) -> dict[str, FileFacts]:
    """Return the facts of files by their names, several read at a time. Raises OSError."""
    with ThreadPoolExecutor(MAX_READERS) as pool:
        facts = pool.map(FileFacts.of, paths)
        return {path.name: fact for path, fact in zip(paths, facts, strict=True)}


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json; `meta` and `metrics` are the caller's."""

    step: int
    files: dict[str, FileFacts]
    meta: dict[str, Any]
    metrics: dict[str, float]

    def write(self, directory: Path) -> None:
        """Write `directory`/manifest.json."""
        body = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        whole = {"sha256": _digest(body), "manifest": body}
        (directory / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check `directory`/manifest.json. Raises DamagedError."""
        path = directory / MANIFEST
        try:
            whole = json.loads(path.read_bytes())
            body, digest = whole["manifest"], whole["sha256"]
        except OSError as error:
            raise DamagedError(f"{path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedError(f"{path} is garbled: {error!r}") from error
        if _digest(body) != digest:
            raise DamagedError(f"{path} is garbled: its sha256 is wrong")
        if body["format"] != FORMAT:
            raise DamagedError(
                f"{path} has format {body['format']}, this version of colospec reads {FORMAT}"
            )
        files = {name: FileFacts(**facts) for name, facts in body["files"].items()}
        return cls(body["step"], files, body["meta"], body["metrics"])

    def check_files(self, directory: Path, *, contents: bool) -> None:
        """Check that all files are there with the right size and, if `contents`, the right sha256.

        Raises DamagedError naming the first file that is not.
        """
        for name, facts in self.files.items():
            path = directory / name
            if not path.is_file():
                raise DamagedError(f"{path} is missing")
            if (size := path.stat().st_size) != facts.size:
                raise DamagedError(f"{path} has {size} bytes, the manifest says {facts.size}")
        if not contents:
            return
        found = read_facts([directory / name for name in self.files])
        for name, facts in self.files.items():
            if found[name] != facts:
                raise DamagedError(f"{directory / name} has a wrong sha256: its bytes have changed")


@dataclass(frozen=True)
class Found:
    """A checkpoint directory with its manifest."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


def step_name(step: int) -> str:
    """Return the directory name of the checkpoint after `step` completed optimizer steps."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int | None:
    """Return the step in a directory name, None for one that is no checkpoint's."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() else None


def open_checkpoint(path: Path, *, contents: bool = True) -> Found:
    """Check one checkpoint directory, bytes included if `contents`. Raises DamagedError."""
    manifest = Manifest.read(path)
    manifest.check_files(path, contents=contents)
    return Found(path, manifest)


def committed(directory: Path, *, contents: bool = False) -> Iterator[Found]:
    """Yield the whole checkpoints of `directory`, newest first, each checked when it is reached.

    Damaged ones are skipped, with a warning that names the file and what is wrong.
    """
    steps = {path: step for path in _children(directory) if (step := step_of(path)) is not None}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        try:
            yield open_checkpoint(path, contents=contents)
        except DamagedError as error:
            log.warning("checkpoint %s is damaged and is not used: %s", path, error)


def latest(directory: Path, *, contents: bool = True) -> Found | None:
    """Return the newest whole checkpoint of `directory`, None if there is none.

    `contents` also compares every byte (sha256, about 1 GB/s per file); without it only names and
    sizes.
    """
    return next(committed(directory, contents=contents), None)


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _digest(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
