"""Who runs what: a pure function from the shape of the job to every rank's place.

No process is started and nothing is looked up here, so the whole table can be printed on a laptop
(`dry_run=true`) and tested for every shape. `world` turns one row of it into process groups.

In colocate mode 2n local ranks use n GPUs: local rank l < n is the trainer on GPU l, local rank
n + l the engine rank on GPU l. Trainer i and engine rank i of the job sit on one GPU and share one
ring. In alternate mode each rank is a trainer that runs its own engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colospec.config import Mode


class Role(Enum):
    """What a rank does; in alternate mode a trainer runs an engine of its own as well."""

    TRAINER = "trainer"
    ENGINE = "engine"


@dataclass(frozen=True)
class Place:
    """One rank's row of the table."""

    rank: int
    """Global rank, as torchrun counts."""
    node: int
    local_rank: int
    role: Role
    gpu: int | None
    """Index of the GPU on its node; None on a CPU."""
    role_rank: int
    """Index among all ranks of this role: trainer i and engine rank i are a pair."""
    role_size: int
    """Number of ranks of this role: the number of pairs."""
    replica: int
    """Engine replica that this rank belongs to, or gets its features from."""
    tp_rank: int
    """Rank inside the engine replica."""
    tp_size: int
    peer: int | None
    """Global rank at the other end of the ring; None in alternate mode."""

    @property
    def world_name(self) -> str:
        """Return the name of the process world that this rank joins as its default group."""
        return "trainer" if self.role is Role.TRAINER else f"engine/{self.replica}"

    @property
    def world_rank(self) -> int:
        """Return this rank's index in that world."""
        return self.role_rank if self.role is Role.TRAINER else self.tp_rank

    @property
    def world_size(self) -> int:
        """Return the size of that world."""
        return self.role_size if self.role is Role.TRAINER else self.tp_size

    @property
    def device(self) -> str:
        """Return torch's name of the device."""
        return "cpu" if self.gpu is None else f"cuda:{self.gpu}"

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.role.value} {self.role_rank} on {self.device})"


@dataclass(frozen=True)
class Topology:
    """The table of all ranks, by global rank, and what to tell the user about it."""

    mode: Mode
    places: tuple[Place, ...]
    notes: tuple[str, ...]

    @property
    def num_trainers(self) -> int:
        return sum(place.role is Role.TRAINER for place in self.places)

    def local(self, node: int) -> tuple[Place, ...]:
        """Return the ranks of one node."""
        return tuple(place for place in self.places if place.node == node)


def build(
    mode: Mode,
    *,
    world_size: int,
    local_world_size: int,
    visible_gpus: int,
    gpus: list[int] | None = None,
    tp: int = 1,
) -> Topology:
    """Place `world_size` ranks, `local_world_size` on each node.

    `visible_gpus` is the number of GPUs that a node shows (0: all ranks run on the CPU); `gpus`
    chooses some of them by index. Raises ValueError, saying what to type, for shapes that cannot
    work.
    """
    if world_size % local_world_size:
        raise ValueError(
            f"{world_size} ranks are not a multiple of {local_world_size} per node; "
            "start every node with the same --nproc-per-node"
        )
    per_gpu = 2 if mode is Mode.colocate else 1
    if local_world_size % per_gpu:
        raise ValueError(
            f"mode=colocate runs a trainer and an engine on each GPU, so {local_world_size} ranks "
            f"per node is impossible; start with --nproc-per-node {local_world_size + 1}"
        )
    num_pairs = local_world_size // per_gpu
    chosen, notes = _choose_gpus(num_pairs, per_gpu, visible_gpus, gpus)
    if num_pairs % tp:
        fitting = ", ".join(str(n) for n in range(1, num_pairs + 1) if num_pairs % n == 0)
        raise ValueError(
            f"engine.tp={tp} does not divide the {num_pairs} engine ranks of a node; "
            f"set engine.tp to one of {fitting}"
        )
    places = []
    total = world_size // per_gpu
    for rank in range(world_size):
        node, local_rank = divmod(rank, local_world_size)
        is_engine = local_rank >= num_pairs
        lane = local_rank % num_pairs
        pair = node * num_pairs + lane
        other = rank - num_pairs if is_engine else rank + num_pairs
        places.append(
            Place(
                rank=rank,
                node=node,
                local_rank=local_rank,
                role=Role.ENGINE if is_engine else Role.TRAINER,
                gpu=chosen[lane] if chosen else None,
                role_rank=pair,
                role_size=total,
                replica=pair // tp,
                tp_rank=pair % tp,
                tp_size=tp,
                peer=other if mode is Mode.colocate else None,
            )
        )
    return Topology(mode, tuple(places), notes)


def _choose_gpus(
    num_pairs: int, per_gpu: int, visible: int, gpus: list[int] | None
) -> tuple[list[int], tuple[str, ...]]:
    """Return the GPU of each pair of a node (none on a CPU) and notes for the user."""
    if visible == 0:
        if gpus is not None:
            raise ValueError(f"topology.gpus={gpus}, but no GPU is visible; remove the setting")
        return [], ()
    if gpus is None:
        gpus = list(range(num_pairs))
        if num_pairs > visible:
            raise ValueError(
                f"{num_pairs * per_gpu} ranks per node need {num_pairs} GPUs, but {visible} are "
                f"visible; start with --nproc-per-node {visible * per_gpu}"
            )
    if len(set(gpus)) != len(gpus) or len(gpus) != num_pairs:
        raise ValueError(
            f"topology.gpus={gpus} must name {num_pairs} distinct GPUs for {num_pairs * per_gpu} "
            f"ranks per node; list as many or start with --nproc-per-node "
            f"{len(set(gpus)) * per_gpu}"
        )
    if wrong := [gpu for gpu in gpus if not 0 <= gpu < visible]:
        raise ValueError(
            f"topology.gpus={gpus}: GPU {wrong[0]} does not exist; {visible} are visible "
            f"(0 to {visible - 1})"
        )
    idle = visible - num_pairs
    note = f"{idle} of {visible} GPUs idle: --nproc-per-node {visible * per_gpu} uses all"
    return gpus, (note,) if idle else ()
