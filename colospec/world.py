"""This rank's place in the running job: the store, the watchdog, signals, and its role's world.

Each role is its own default world: the trainers of all nodes are one, every engine replica is one.
So FSDP2, checkpoints and engines see ordinary worlds, no collective names a group, and none can
reach a rank of the other role.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from colospec.config import LimitConfig
from colospec.store import JobStore, stop_key
from colospec.topology import Place, Topology
from colospec.watchdog import End, Watchdog

log = logging.getLogger(__name__)


class World:
    """Facts and connections of one running rank; made by `open_world`."""

    def __init__(self, topology: Topology, place: Place, limit: LimitConfig) -> None:
        self.topology = topology
        self.place = place
        self.limit = limit
        self.device = torch.device(place.device)
        self.store = JobStore.connect(timeout_s=limit.start_s)
        self.watchdog = Watchdog(self.store.clone(), place, topology.local(place.node))

    @property
    def stop_requested(self) -> bool:
        """True once any rank got SIGTERM or SIGINT."""
        return self.watchdog.stop_requested.is_set()

    @property
    def is_stop_foreign(self) -> bool:
        """True if only ranks of other nodes were asked to stop."""
        return self.stop_requested and self.store.peek(stop_key(self.place.node)) is None

    def phase(self, name: str, limit_s: float) -> None:
        """Begin a phase of the run, for messages and for the watchdog's limit."""
        self.store.set(f"phase/{self.place.rank}", name.encode())
        self.watchdog.phase(name, limit_s)

    def barrier(self, name: str) -> None:
        """Wait for all ranks of the job, of both roles."""
        world_size = len(self.topology.places)
        rank, limit_s = self.place.rank, self.limit.load_s
        self.store.barrier(name, rank=rank, world_size=world_size, timeout_s=limit_s)

    def agree(self, what: str, value: str) -> None:
        """Check that all ranks hold the same `value`; raises RuntimeError naming the two ranks."""
        digest = hashlib.sha256(value.encode()).hexdigest()
        if self.place.rank == 0:
            self.store.set(f"agree/{what}", digest.encode())
        first = self.store.get(f"agree/{what}", timeout_s=self.limit.load_s).decode()
        if first != digest:
            raise RuntimeError(
                f"{self.place} has another {what} than rank 0 ({digest[:12]} against "
                f"{first[:12]}); start all nodes with the same command, code and files"
            )

    def from_rank0(self, key: str, value: str | None) -> str:
        """Return rank 0's `value` on every rank; the others' is not looked at."""
        if self.place.rank == 0:
            self.store.set(f"rank0/{key}", (value or "").encode())
        return self.store.get(f"rank0/{key}", timeout_s=self.limit.start_s).decode()

    def join_role(self) -> None:
        """Build this role's default process group (every rank, once)."""
        place = self.place
        dist.init_process_group(
            backend="gloo" if place.gpu is None else "cpu:gloo,cuda:nccl",
            store=self.store.role_store(place.world_name),
            rank=place.world_rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=self.limit.load_s),
        )


@contextmanager
def open_world(topology: Topology, limit: LimitConfig) -> Iterator[World]:
    """Join the job as the rank that torchrun's environment names.

    Raises StoreUnreachable where torchrun's store does not answer within `limit.start_s`.

    An exception that leaves the body becomes the first error of the job, and the process ends with
    code 1; when another rank failed first, that error is reported instead.
    """
    place = topology.places[int(os.environ["RANK"])]
    world = World(topology, place, limit)
    try:
        world.watchdog.start()
        world.phase("start", limit.start_s)
        yield world
    except BaseException as error:
        text = f"{place}: {type(error).__name__}: {error}"
        log.debug("%s", text, exc_info=error)
        _leave(world, text)
    else:
        world.phase("end", limit.start_s)
        if dist.is_initialized():
            dist.destroy_process_group()
        world.watchdog.stop()


def _leave(world: World, error: str) -> NoReturn:
    """Record `error` and end the process: a clean shutdown could block on ranks that are gone."""
    try:
        # A signal ends the helpers of this rank too, sooner than the watchdog's next look.
        world.watchdog.look()
        first = world.watchdog.record(error)
    except Exception:
        first = End(world.place.rank, world.place.node, error)
        log.error("%s", error)
    world.watchdog.abort(first)
