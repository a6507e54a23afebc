"""Run a function as the ranks of a small gloo world, in real processes.

    results = run_ranks(check_something, 2, argument)

`check_something(rank, argument)` must be importable: a module-level function of the test file.
Its return values come back as a list by rank. The first rank that fails fails the test with its
own traceback; the others are killed, and nothing outlives `timeout_s`.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# One server imports torch once, and each rank is a fork of it: 0.1 s instead of 3 s of CPU a rank.
_PRELOAD = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.llama.configuration_llama",
]


class RankError(AssertionError):
    """A rank failed, died or hung; the message holds its traceback or its stacks."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    backend: str = "gloo",
) -> list[Any]:
    """Call `fn(rank, *args)` in `world_size` processes.

    Each rank has the caller's environment and working directory, one thread, and a
    torch.distributed default group of `backend`, torn down after `fn`. For CUDA tensors, use
    "cpu:gloo,cuda:nccl". Raises RankError as said above.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        directory = Path(name)
        ranks: dict[Connection, BaseProcess] = {}
        try:
            for rank in range(world_size):
                here, there = context.Pipe(duplex=False)
                place = _Place(rank, world_size, directory, timeout_s, backend)
                process = context.Process(target=_be_rank, args=(place, there, fn, args))
                process.start()
                there.close()
                ranks[here] = process
            return _collect(ranks, directory, timeout_s)
        finally:
            for connection, process in ranks.items():
                process.kill()
                process.join()
                connection.close()


class _Place:
    """What a rank needs to know, taken from the parent: a fork of the server has neither."""

    def __init__(
        self, rank: int, world_size: int, directory: Path, timeout_s: float, backend: str
    ) -> None:
        self.rank, self.world_size, self.backend = rank, world_size, backend
        self.directory, self.timeout_s = directory, timeout_s
        self.environment = dict(os.environ)
        self.cwd = Path.cwd()


def _collect(ranks: dict[Connection, BaseProcess], directory: Path, timeout_s: float) -> list[Any]:
    order = list(ranks)
    results: dict[Connection, Any] = {}
    # Each rank ends itself at `timeout_s` from its start; this is for one that cannot.
    deadline = time.monotonic() + timeout_s + 20.0
    while len(results) < len(order):
        waiting = [connection for connection in order if connection not in results]
        ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0.0))
        if not ready:
            stuck = [order.index(connection) for connection in waiting]
            raise RankError(f"ranks {stuck} hung for {timeout_s:g} s\n{_stacks(directory)}")
        failures = []
        for connection in ready:
            rank = order.index(connection)
            try:
                failed_at, value = connection.recv()
            except EOFError:
                failures.append((0.0, rank, _last_word(ranks[connection], directory)))
                continue
            results[connection] = value
            if failed_at is not None:
                failures.append((failed_at, rank, value))
        if failures:
            _, rank, text = min(failures)
            raise RankError(f"rank {rank} of {len(order)}: {text}")
    for process in ranks.values():
        process.join(10.0)
    return [results[connection] for connection in order]


def _last_word(process: BaseProcess, directory: Path) -> str:
    """Say how a rank ended that reported nothing; killed ranks leave no stacks."""
    process.join(5.0)
    stacks = _stacks(directory)
    verb = "hung" if "Timeout" in stacks else "died"
    return f"{verb} (exit code {process.exitcode})\n{stacks}"


def _stacks(directory: Path) -> str:
    return "\n".join(
        f"--- {path.name}\n{path.read_text()}" for path in sorted(directory.glob("stacks-*"))
    )


def _be_rank(place: _Place, report: Connection, fn: Callable[..., Any], args: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ.clear()
    os.environ.update(place.environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.chdir(place.cwd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        with (place.directory / f"stacks-{place.rank}").open("w") as stacks:
            # A hung rank, or one that crashes in C, leaves its stacks behind and ends.
            faulthandler.enable(stacks)
            faulthandler.dump_traceback_later(place.timeout_s, file=stacks, exit=True)
            dist.init_process_group(
                place.backend,
                store=dist.FileStore(str(place.directory / "store"), place.world_size),
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=place.timeout_s + 30),
            )
            value = fn(place.rank, *args)
            dist.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
        report.send((None, value))
    except BaseException:
        # Sent before this process ends: its peers' "connection closed" can only come later.
        report.send((time.monotonic(), traceback.format_exc()))
        sys.stdout.flush()
        os._exit(1)
