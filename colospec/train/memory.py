"""What a rank may take of its GPU, and what to change where that is too little."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch

from colospec.config import Mode, RingPayload, RunConfig
from colospec.ring.spec import SlotLayout
from colospec.topology import Role
from colospec.train.job import Job
from colospec.world import World

log = logging.getLogger(__name__)


def limit_memory(job: Job, world: World) -> None:
    """Cap what this rank may allocate at its share of the GPU; rank 0 prints the split."""
    run, device = job.run, world.device
    total = torch.cuda.get_device_properties(device).total_memory
    ring = ring_bytes(job) / total
    share = memory_share(run, world.place.role, ring=ring)
    if share <= 0:
        raise ValueError(
            f"memory.engine_fraction={run.memory.engine_fraction} does not even hold the ring, "
            f"{ring_bytes(job) / 2**30:.1f} GiB; raise it, or lower ring.num_slots or "
            "data.token_budget"
        )
    torch.cuda.set_per_process_memory_fraction(share, device)
    if world.place.rank == 0:
        gib = total / 2**30
        log.info(
            "memory of a GPU (%.0f GiB): trainer %.1f GiB, engine %.1f GiB with %.1f GiB of ring",
            gib, run.memory.trainer_fraction * gib, run.memory.engine_fraction * gib, ring * gib,
        )  # fmt: skip


def ring_bytes(job: Job) -> int:
    """Return what the slots of one engine take of its GPU."""
    run = job.run
    if run.mode is not Mode.colocate or run.ring.payload is RingPayload.host:
        return 0
    return run.ring.num_slots * SlotLayout.plan(job.spec, run.data.token_budget).slot_bytes


def memory_share(run: RunConfig, role: Role, *, ring: float = 0.0) -> float:
    """Return the share of its GPU that torch's allocator of a rank may take: an engine's without
    its `ring`, which is not torch's; in alternate mode that of both roles."""
    if run.mode is Mode.alternate:
        return run.memory.trainer_fraction + run.memory.engine_fraction
    if role is Role.ENGINE:
        return run.memory.engine_fraction - ring
    return run.memory.trainer_fraction


@contextmanager
def explain_memory(run: RunConfig, world: World) -> Iterator[None]:
    """Say which settings a trainer's memory depends on when it has run out; raises RuntimeError."""
    names = (*run.draft.sized_by, "data.token_budget")
    lower = " or ".join(f"{name}={attrgetter(name)(run)}" for name in names)
    share = f"memory.trainer_fraction={run.memory.trainer_fraction}"
    if run.mode is Mode.alternate:
        share = f"{share} and memory.engine_fraction={run.memory.engine_fraction}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"{world.place} needs more than its share of the GPU's memory: lower {lower} (in a new "
            f"run_dir), or raise its share, {share} ({error})"
        ) from error
