"""CUDA MPS in a rank: agree with the node's other ranks on a daemon, then become its client.

`bootstrap` comes before the first CUDA call of a rank, `Mps.prove_client` after it.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from colospec.config import MemoryConfig, Mode, MpsConfig, MpsUse, RunConfig
from colospec.mps import gpus
from colospec.mps.control import PIPE_VARIABLE, Control
from colospec.mps.errors import MpsError
from colospec.mps.start import probe, require_client, start_keeper, stop_all_of
from colospec.topology import Place, Role

if TYPE_CHECKING:
    from colospec.store import JobStore

# Of each GPU's memory, for what a CUDA context takes beside the allocator's share.
CONTEXT_FRACTION = 0.05
# Nobody listens there: CUDA then runs without MPS, whatever daemon is at its default place.
NO_PIPE = "/nonexistent"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mps:
    """The daemon that this rank is about to be a client of."""

    pipe: Path
    gpus: tuple[str, ...]
    """UUIDs, in the order of cuda:0, cuda:1, ..."""

    def prove_client(self, pid: int, *, patience_s: float = 5.0) -> None:
        """Raise MpsError unless process `pid` is a client of this daemon.

        Call it after the process's first CUDA call: CUDA runs without MPS, and says nothing, where
        it does not reach the daemon.
        """
        require_client(Control(self.pipe), pid, patience_s=patience_s)
        log.debug("mps: pid %d is a client of the daemon in %s", pid, self.pipe)


@dataclass(frozen=True)
class Node:
    """What local rank 0 tells the other ranks of its node."""

    pipe: str
    daemon: int | None
    """Its pid; None for one that we did not start."""
    uuids: tuple[str, ...]
    memory_mib: tuple[int | None, ...]


def bootstrap(run: RunConfig, place: Place, store: JobStore, *, limit_s: float) -> Mps | None:
    """Make this rank a client-to-be of its node's MPS daemon: sets os.environ. All ranks call it.

    Local rank 0 starts the daemon, or takes the one that the user's CUDA_MPS_PIPE_DIRECTORY names,
    and proves that it serves; the others wait up to `limit_s` seconds for its word. Returns None
    where roles do not share a GPU (on a CPU, in other modes than colocate), with mps=off, and with
    mps=auto where MPS does not work.

    Raises RuntimeError where mps=require cannot be had or CUDA has started already, TimeoutError
    naming local rank 0 if it says nothing.
    """
    use = run.mps.use
    if place.gpu is None or run.mode is not Mode.colocate:
        return None
    if use is MpsUse.off:
        os.environ[PIPE_VARIABLE] = NO_PIPE
        return None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"{place}: CUDA has started before MPS was set up; import nothing in this rank that "
            "uses the GPU when it is imported (engine.module?)"
        )
    key = f"mps/{place.node}"
    if place.local_rank == 0:
        store.set_json(key, _serve_node(owner=os.getppid()))
    try:
        answer = store.get_json(key, timeout_s=limit_s)
    except TimeoutError:
        raise TimeoutError(
            f"{place}: local rank 0 of node {place.node} did not say within {limit_s:g} s "
            "whether CUDA MPS runs there; see its log"
        ) from None
    if "error" in answer:
        _without_mps(use, place, answer["error"])
        return None
    node = Node(**answer)
    os.environ.update(environment(run.mps, run.memory, place.role, node=node))
    if place.rank == 0:
        ours = "your daemon" if node.daemon is None else f"daemon {node.daemon}"
        log.info("mps: %s in %s (CUDA MPS, %d GPUs)", ours, node.pipe, len(node.uuids))
    return Mps(Path(node.pipe), tuple(node.uuids))


def environment(mps: MpsConfig, memory: MemoryConfig, role: Role, *, node: Node) -> dict[str, str]:
    """Return the variables that a rank of `role` needs before CUDA starts in it.

    Raises RuntimeError where memory is to be limited and the driver does not say how much there is.
    """
    variables = {
        PIPE_VARIABLE: node.pipe,
        gpus.VISIBLE_VARIABLE: ",".join(node.uuids),
        "CUDA_MPS_CLIENT_PRIORITY": str(getattr(mps, f"{role.value}_priority")),
        # Under MPS a client has 2 hardware queues by default: copies would wait behind kernels.
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "8"),
    }
    threads = getattr(mps, f"{role.value}_threads")
    if threads is not None:
        variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(threads)
    if mps.limit_memory:
        share = float(getattr(memory, f"{role.value}_fraction")) + CONTEXT_FRACTION
        limits = []
        for index, total in enumerate(node.memory_mib):
            if total is None:
                raise RuntimeError(
                    f"mps.limit_memory=true, but nvidia-smi does not say how much memory GPU "
                    f"{index} has; set mps.limit_memory=false"
                )
            limits.append(f"{index}={int(share * total)}M")
        variables["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = ",".join(limits)
    return variables


def _without_mps(use: MpsUse, place: Place, error: str) -> None:
    """Go on without MPS, or raise RuntimeError where the run requires it."""
    if use is MpsUse.require:
        raise RuntimeError(
            f"mps=require, but CUDA MPS does not work on node {place.node}: {error}. Repair it "
            "(python -m colospec.doctor), set mps=auto to share each GPU by time slicing, or use "
            "+mode=alternate, which needs no MPS"
        )
    if place.local_rank == 0:
        log.warning(
            "CUDA MPS does not work on node %d, so trainer and engine share each GPU by time "
            "slicing, which is slower: %s",
            place.node, error,
        )  # fmt: skip
    os.environ[PIPE_VARIABLE] = NO_PIPE


def _serve_node(owner: int) -> dict[str, object]:
    """Find or start this node's daemon and prove that it serves (local rank 0)."""
    try:
        found = gpus.visible()
        uuids = gpus.uuid_list(found)
        theirs = os.environ.get(PIPE_VARIABLE)
        if theirs:
            pipe, daemon = Path(theirs), None
            check_users_daemon(pipe)
            probe(pipe, uuids)
        else:
            # Left by an attempt of this job that torchrun has restarted; its GPU may be at fault.
            stop_all_of(owner)
            started = start_keeper(owner, gpus=uuids)
            pipe, daemon = started.pipe, started.daemon
            try:
                probe(pipe, uuids)
            except MpsError:
                stop_all_of(owner)
                raise
    except MpsError as error:
        return {"error": str(error)}
    node = Node(
        str(pipe), daemon, tuple(gpu.uuid for gpu in found), tuple(gpu.memory_mib for gpu in found)
    )
    return vars(node)


def check_users_daemon(pipe: Path) -> None:
    """Raise MpsError unless a daemon of this user, or root's, answers in `pipe`.

    One server serves one user at a time: another user's daemon would let this job wait.
    """
    fix = f"start it again, or unset {PIPE_VARIABLE} to let the job start its own"
    try:
        facts = (pipe / "control").stat()
    except OSError as error:
        raise MpsError(f"{PIPE_VARIABLE}={pipe} holds no MPS daemon ({error}); {fix}") from None
    if not stat.S_ISSOCK(facts.st_mode):
        raise MpsError(f"{PIPE_VARIABLE}={pipe}: control is not a socket; {fix}")
    if facts.st_uid not in (0, os.getuid()):
        raise MpsError(
            f"the MPS daemon in {PIPE_VARIABLE}={pipe} belongs to user {facts.st_uid}, and this "
            f"job to user {os.getuid()}; {fix}"
        )
    try:
        Control(pipe).servers()
    except MpsError as error:
        raise MpsError(f"{PIPE_VARIABLE}={pipe}: {error}; {fix}") from None
