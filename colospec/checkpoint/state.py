"""What goes through torch.distributed.checkpoint: nested dicts of tensors, DTensors and scalars.

`stage` makes the copy that a background thread may write while training goes on; `ExactLoadPlanner`
loads only what fits key by key.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

RNG = "rng"
# A rank's part goes to one file for every FILE_BYTES of it, all of them written at a time.
FILE_BYTES = 2**28
MAX_FILES = 8


def stage(value: Any) -> Any:
    """Return a copy of nested dicts and lists with every tensor copied to the CPU."""
    if isinstance(value, dict):
        return {key: stage(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(stage(item) for item in value)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return value


def local_bytes(value: Any) -> int:
    """Return the bytes of all tensors of a nested state, of a DTensor only this rank's shard."""
    if isinstance(value, dict):
        return sum(local_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(local_bytes(item) for item in value)
    if isinstance(value, DTensor):
        return value.to_local().nbytes
    return value.nbytes if isinstance(value, Tensor) else 0


class Writer(dcp.FileSystemWriter):
    """Writes a rank's shards, each file in a thread of its own; a full disk is an OSError, which
    torch.save hides behind its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files. Raises OSError where the disk fails.

        torch's own threads would lose the error of one that fails.
        """
        parts = [
            replace(plan, items=items, storage_data=_prefixed(plan.storage_data, number))
            for number, items in enumerate(_spread(plan.items))
        ]
        with ThreadPoolExecutor(len(parts)) as pool:
            results = pool.map(lambda part: self._write_part(part, planner), parts)
            written: Future[list[WriteResult]] = Future()
            written.set_result([result for some in results for result in some])
            return written

    def _write_part(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        try:
            return super().write_data(plan, planner).wait()
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _prefixed(storage: Any, number: int) -> Any:
    """Return the storage data of a plan with a prefix of its own for the files of one part."""
    return replace(storage, prefix=f"{storage.prefix}{number}_")


def _spread(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Deal the items out to as many files as their bytes are worth, large ones first."""
    sizes = {id(item): _num_bytes(item) for item in items}
    number = max(1, min(MAX_FILES, len(items), sum(sizes.values()) // FILE_BYTES))
    parts: list[list[WriteItem]] = [[] for _ in range(number)]
    totals = [0] * number
    for item in sorted(items, key=lambda item: -sizes[id(item)]):
        smallest = totals.index(min(totals))
        parts[smallest].append(item)
        totals[smallest] += sizes[id(item)]
    return parts


def _num_bytes(item: WriteItem) -> int:
    facts = item.tensor_data
    return facts.chunk.sizes.numel() * facts.properties.dtype.itemsize if facts else 0


class ExactLoadPlanner(DefaultLoadPlanner):
    """Load only a checkpoint whose keys and shapes are those of the state.

    torch's own planner ignores keys that the state lacks, so that a checkpoint of another draft
    model would load in part. Random states are apart: every rank asks for its own alone.
    """

    def create_local_plan(self) -> LoadPlan:
        """Plan this rank's reads. Raises ValueError listing what does not fit."""
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        wanted = self.state_dict
        faults = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
        for name, facts in saved.items():
            if name not in wanted:
                if not name.startswith(f"{RNG}."):
                    faults.append(f"{name} is only in the checkpoint")
            elif isinstance(facts, TensorStorageMetadata):
                shape = tuple(getattr(wanted[name], "shape", ()))
                if shape != tuple(facts.size):
                    faults.append(f"{name} has shape {tuple(facts.size)}, expected {shape}")
        if faults:
            more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise ValueError("; ".join(sorted(faults)[:8]) + more)
        return super().create_local_plan()


def save_state(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Write this rank's part of `state` into the directory `path` (all ranks of `group`).

    Without a group one process writes all. Raises RuntimeError, on every rank, naming the rank that
    failed and why.
    """
    try:
        with _alone(group):
            # All is on the CPU: nothing to copy ahead.
            writer = Writer(path, per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        raise RuntimeError(_first_failure(error)) from error


def read_metadata(path: Path) -> Metadata:
    """Return what torch.distributed.checkpoint wrote about the tensors in `path`."""
    return dcp.FileSystemReader(path).read_metadata()


def load_state(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Load the checkpoint into the tensors and dicts of `state` (all ranks of `group`).

    state["rng"] loses the entries of ranks that the checkpoint does not have. Without a group one
    process loads alone. Raises ValueError on every rank if the state does not fit.
    """
    saved = read_metadata(path).state_dict_metadata
    for rank in list(state.get(RNG, {})):
        if f"{RNG}.{rank}" not in saved:
            del state[RNG][rank]
    wanted = {key: value for key, value in state.items() if value}
    try:
        with _alone(group):
            dcp.load(
                wanted,
                storage_reader=dcp.FileSystemReader(path),
                planner=ExactLoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.CheckpointException as error:
        raise ValueError(f"{path} does not fit this run: {_first_failure(error)}") from error
    state.update(wanted)


def load_model(path: Path) -> dict[str, Tensor]:
    """Load the tensors under "model" of a checkpoint, whole, in one process without a group."""
    prefix = "model."
    model = {
        name.removeprefix(prefix): torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in read_metadata(path).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(facts, TensorStorageMetadata)
    }
    with _alone(None):
        dcp.load({"model": model}, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return model


def _first_failure(error: dcp.CheckpointException) -> str:
    """Return "rank r: what happened" of the lowest rank that failed."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {type(cause).__name__}: {cause}"


@contextmanager
def _alone(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Without a group, silence the warning that there is none: one process is what we want."""
    if group is not None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
