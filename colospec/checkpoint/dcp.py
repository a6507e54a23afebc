"""Save training state while training goes on, and resume from the newest whole checkpoint.

All trainer ranks make every call together. `save` copies the state to the CPU and returns; a thread
writes the copy with torch.distributed.checkpoint on a process group of its own (on the group that
training uses, two threads would mix their collectives and hang). The order on disk is

    step-000120.tmp/   every rank writes, syncs and hashes its own files
    manifest.json      rank 0, last
    step-000120/       rank 0 renames, syncs the parent and removes old checkpoints

so a crash at any point leaves the checkpoints before. The ranks tell each other how it went: a save
has succeeded on all ranks or on none, and its error comes out of the next `save` or `wait` on all
of them.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from colospec.checkpoint.manifest import (
    DamagedError,
    FileFacts,
    Found,
    Manifest,
    latest,
    open_checkpoint,
    read_facts,
    step_name,
    step_of,
)
from colospec.checkpoint.peers import Peers
from colospec.checkpoint.rotate import rotate
from colospec.checkpoint.state import load_state, local_bytes, save_state, stage
from colospec.durable import TEMPORARY, clear, publish

log = logging.getLogger(__name__)


@dataclass
class _Save:
    """One save, between the caller and the writing thread."""

    step: int
    state: dict[str, Any]
    meta: dict[str, Any]
    metrics: dict[str, float]
    num_bytes: int
    error: Exception | None = None


@dataclass(frozen=True)
class _Report:
    """What a rank has written: its files, or why it could not."""

    error: str | None
    num_bytes: int
    files: dict[str, FileFacts]


class Checkpointer:
    """The checkpoints of one run: `choose`, `load`, then `save` again and again, last `wait`.

    All ranks construct it and make every call together, from one thread.

    `group` is a gloo group of all trainers that nothing else uses, None in a job of one process.
    Kept are the newest `keep` checkpoints and the one with the best value of `best_metric`: the
    lowest, or the highest if the name ends in `_length`. `limit_s` bounds every wait for a save.
    """

    def __init__(
        self,
        directory: Path,
        *,
        group: dist.ProcessGroup | None,
        rank: int,
        world_size: int,
        keep: int,
        best_metric: str,
        limit_s: float,
    ) -> None:
        self.directory = directory
        self._peers = Peers(group, rank=rank, world_size=world_size)
        self._keep, self._best_metric, self._limit_s = keep, best_metric, limit_s
        self._newest_step: int | None = None
        self._verified: Path | None = None
        self._current: _Save | None = None
        self._thread: threading.Thread | None = None
        self._peers.from_rank0(self._prepare)

    def newest_step(self) -> int | None:
        """Return the step of this directory's checkpoint that this process saved or loaded last,
        None before the first."""
        return self._newest_step

    def latest(self) -> Found | None:
        """Return the newest whole checkpoint, checked byte for byte, the same on all ranks."""
        return self._find(lambda: latest(self.directory))

    def choose(self, resume: str) -> Path | None:
        """Return the checkpoint that `resume` means, the same on all ranks; None starts anew.

        `auto` is the newest whole one, if any; `never` refuses a directory that has one; anything
        else is the path of a checkpoint. Raises ValueError, on all ranks, for one that is damaged
        and for `auto` where all are: a run must not start anew because of a bad disk.
        """
        found = self._find(lambda: _choose(self.directory, resume))
        return found.path if found else None

    def load(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Load a checkpoint in place and return the `meta` that it was saved with.

        The tensors and DTensors of `state` are overwritten, whatever the number of trainers was;
        state["rng"] holds this rank's entry afterwards only if the checkpoint has one. Raises
        ValueError, on all ranks, for a checkpoint that is damaged or does not fit.
        """
        contents = path != self._verified
        found = self._find(lambda: open_checkpoint(path, contents=contents))
        assert found is not None
        load_state(found.path, state, self._peers.group)
        is_ours = found.path.parent.resolve() == self.directory.resolve()
        self._newest_step = found.step if is_ours else None
        self._verified = None
        return found.manifest.meta

    def save(
        self, step: int, state: dict[str, Any], meta: dict[str, Any], *, metrics: dict[str, float]
    ) -> None:
        """Copy `state` to the CPU and write it in the background as the checkpoint of `step`.

        `step` counts completed optimizer steps; `meta` (JSON) comes back from `load`. Once this
        returns, the tensors may change. Waits for the save before, and raises what `wait` raises.
        """
        self.wait()
        meta = json.loads(json.dumps(meta))
        staged = stage(state)
        numbers = {name: float(value) for name, value in metrics.items()}
        self._current = _Save(step, staged, meta, numbers, local_bytes(staged))
        self._newest_step = step
        self._thread = threading.Thread(
            target=self._write, args=(self._current,), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises RuntimeError, on all ranks, if it failed, and TimeoutError after `limit_s`.
        """
        if self._thread is None or self._current is None:
            return
        self._thread.join(self._limit_s)
        if self._thread.is_alive():
            raise TimeoutError(
                f"checkpoint {self._path(self._current.step)} was not written within "
                f"{self._limit_s:g} s; if the disk is only slow, raise limit.checkpoint_s"
            )
        error = self._current.error
        self._thread = self._current = None
        if error is not None:
            raise error

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for stale in clear(self.directory):
            log.warning("removed %s, which a killed run left unfinished", stale)

    def _find(self, work: Callable[[], Found | None]) -> Found | None:
        """Let rank 0 look and check; its answer or its error is everybody's."""
        self.wait()  # the writing thread has the group until it is done
        found = self._peers.from_rank0(work)
        self._verified = found.path if found else None
        return found

    def _path(self, step: int) -> Path:
        return self.directory / step_name(step)

    def _write(self, save: _Save) -> None:
        """Write one checkpoint: the whole life of a thread."""
        start = time.monotonic()
        path = self._path(save.step)
        try:
            reports = self._peers.gather(self._write_shards(path.with_suffix(TEMPORARY), save))
            self._peers.from_rank0(lambda: self._commit(path, save, reports))
        except Exception as error:
            save.error = RuntimeError(f"checkpoint {path} was not written: {error}")
            save.error.__cause__ = error
            return
        finally:
            save.state = {}
        if self._peers.rank == 0:
            size_gib = sum(report.num_bytes for report in reports) / 2**30
            duration_s = time.monotonic() - start
            log.info("checkpoint %s, %.2f GiB in %.1f s", path, size_gib, duration_s)

    def _write_shards(self, temporary: Path, save: _Save) -> _Report:
        rank, group = self._peers.rank, self._peers.group
        files, error = {}, None
        try:
            save_state(temporary, save.state, group)
            mine = list(temporary.glob(f"__{rank}_*"))
            if rank == 0:
                mine.append(temporary / ".metadata")
            files = read_facts(mine)
        except RuntimeError as failure:
            error = str(failure)
        except OSError as failure:
            error = f"rank {rank}: {failure}"
        return _Report(error, save.num_bytes, files)

    def _commit(self, path: Path, save: _Save, reports: list[_Report]) -> None:
        """Turn the written shards into a checkpoint (rank 0). Raises RuntimeError if it cannot."""
        temporary = path.with_suffix(TEMPORARY)
        error = next((report.error for report in reports if report.error), None)
        try:
            if error is None:
                files = {name: facts for report in reports for name, facts in report.files.items()}
                Manifest(save.step, files, save.meta, save.metrics).write(temporary)
                publish(temporary, path)
        except OSError as failure:
            error = f"rank 0: {failure}"
        if error is not None:
            free = shutil.disk_usage(self.directory).free
            shutil.rmtree(temporary, ignore_errors=True)
            needed = sum(report.num_bytes for report in reports)
            raise RuntimeError(
                f"{error}. It needs {needed:,} bytes and {free:,} are free on that disk; earlier "
                "checkpoints are untouched. If the disk is full, free some space or lower "
                "trainer.keep; then go on with the same run_dir"
            )
        self._rotate(save)

    def _rotate(self, save: _Save) -> None:
        if self._best_metric not in save.metrics:
            log.warning(
                "step %d cannot become the best checkpoint: it has no trainer.best_metric=%s, "
                "only %s", save.step, self._best_metric, ", ".join(sorted(save.metrics)),
            )  # fmt: skip
        try:
            rotate(
                self.directory,
                newest=save.step,
                keep=self._keep,
                best_metric=self._best_metric,
            )
        except OSError as error:
            log.warning("old checkpoints could not be removed: %s", error)


def _choose(directory: Path, resume: str) -> Found | None:
    if resume not in ("auto", "never"):
        try:
            return open_checkpoint(Path(resume))
        except DamagedError as error:
            raise ValueError(
                f"resume={resume} is not a whole checkpoint: {error}; set resume to auto, never or "
                "the path of one"
            ) from error
    found = latest(directory, contents=resume == "auto")
    if found is not None and resume == "never":
        raise ValueError(
            f"resume=never, but {found.path} is there; choose another run_dir, or go on from it "
            "with resume=auto"
        )
    damaged = [path for path in directory.iterdir() if step_of(path) is not None]
    if found is None and damaged:
        raise ValueError(
            f"every checkpoint in {directory} is damaged ({len(damaged)}; the log says how); "
            "move them away to start anew"
        )
    return found
