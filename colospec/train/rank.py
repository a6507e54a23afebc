"""One rank's life, from joining the job to its last word."""

from __future__ import annotations

import fcntl
import logging
import os
import time
import uuid
from pathlib import Path

import torch

from colospec import log as logs
from colospec.batch import FeatureSource
from colospec.config import Mode, RunConfig
from colospec.durable import clear
from colospec.mps.client import bootstrap
from colospec.mps.products import check_products, model_shapes
from colospec.ring.channel import Reader, Writer
from colospec.topology import Role, Topology
from colospec.train.deterministic import make_deterministic
from colospec.train.job import Job, Start
from colospec.train.memory import explain_memory, limit_memory
from colospec.train.probe_target import LocalTarget, ProbeTarget, RingTarget
from colospec.train.produce import AlternateSource, load_engine, produce
from colospec.train.provenance import plain, write_provenance
from colospec.train.trainer import Trainer
from colospec.world import World, open_world

log = logging.getLogger(__name__)


def run_rank(run: RunConfig, topology: Topology, run_dir: Path) -> int:
    """Join the job and play this rank's role until the run ends; return the exit code.

    A stop that only another node was asked for is no end of this one's work: its first rank, a
    trainer, then returns 75 (EX_TEMPFAIL), and whoever keeps the nodes running starts it again.
    """
    with open_world(topology, run.limit) as world:
        directory = Path(world.from_rank0("run_dir", str(run_dir.resolve())))
        check_shared(directory, world)
        logs.setup(directory, world.place.rank)
        world.agree("configuration", repr(plain(run)))
        if run.trainer.deterministic:
            make_deterministic()
        enter_gpu(run, world)
        _announce(run, topology, directory, world)
        world.watchdog.before_abort = lambda: _remove_half_checkpoints(directory, world)
        world.phase("load", run.limit.load_s)
        job = Job.load(
            run, num_trainers=topology.num_trainers, progress=world.place.local_rank == 0
        )
        world.agree("plan", job.plan.digest)
        if world.place.gpu is not None:
            limit_memory(job, world)
            check_products(world.device, _model_shapes(job))
        world.join_role()
        if world.place.role is Role.ENGINE:
            _be_engine(job, world)
            return os.EX_OK
        with explain_memory(run, world):
            return _be_trainer(job, world, directory)


def enter_gpu(run: RunConfig, world: World) -> None:
    """Make this rank a client of its node's MPS daemon, if there is to be one, and choose its GPU.

    Nothing before this has touched CUDA. Raises RuntimeError where mps.use=require and it fails.
    """
    if world.place.gpu is None:
        return
    daemon = bootstrap(run, world.place, world.store, limit_s=run.limit.start_s)
    torch.cuda.set_device(world.device)
    torch.empty(1, device=world.device)
    if daemon is not None:
        daemon.prove_client(os.getpid())


def _model_shapes(job: Job) -> list[tuple[int, int, int]]:
    """Return the shapes of the run's largest matrix products."""
    run = job.run
    return model_shapes(
        job.target,
        tokens=run.data.token_budget,
        tp=run.engine.tp,
        draft_vocab_size=getattr(run.draft, "draft_vocab_size", None),
    )


def check_shared(run_dir: Path, world: World, *, patience_s: float = 10.0) -> None:
    """Raise RuntimeError on nodes that do not see rank 0's run directory (a network file system
    may take `patience_s` seconds to show it)."""
    mark = run_dir / ".job"
    if world.place.rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RuntimeError(
                f"run_dir={run_dir} cannot be made: {error.strerror}; choose another run_dir"
            ) from error
        token = uuid.uuid4().hex
        _claim(run_dir)
        mark.write_text(token)
        world.from_rank0("job", token)
        return
    token = world.from_rank0("job", None)
    deadline = time.monotonic() + patience_s
    while not (mark.is_file() and mark.read_text() == token):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{world.place}: node {world.place.node} does not see the run directory of rank 0, "
                f"{run_dir}; set run_dir=PATH on a file system that all nodes share"
            )
        time.sleep(0.1)


def _claim(run_dir: Path) -> None:
    """Lock `run_dir` for the life of this process: a second job would delete our checkpoints."""
    lock = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"another job is using run_dir={run_dir}; wait for it, or choose another run_dir"
        ) from None


def _be_engine(job: Job, world: World) -> None:
    engine = load_engine(job, world)
    start = Start(**world.store.get_json("start", timeout_s=world.limit.load_s))
    world.phase("attach", world.limit.load_s)
    run, pair = job.run, str(world.place.role_rank)
    sink = Writer(
        world.store,
        pair,
        job.spec,
        max_tokens=run.data.token_budget,
        max_sequences=run.data.max_sequences,
        num_slots=run.ring.num_slots,
        plan_digest=job.plan.digest,
        timeout_s=world.limit.load_s,
        device=world.device,
        payload=run.ring.payload.value,
    )
    # Longer than a trainer may take to save.
    world.phase("capture", 2 * world.limit.step_s + world.limit.checkpoint_s)
    try:
        produce(job, world, engine, sink, start)
    except Exception as error:
        sink.fail(f"{world.place}: {type(error).__name__}: {error}")
        raise
    world.phase("drain", world.limit.load_s + world.limit.checkpoint_s)
    sink.close()
    engine.close()


def _be_trainer(job: Job, world: World, run_dir: Path) -> int:
    run = job.run
    trainer = Trainer(job, world, run_dir)
    start = trainer.resume()
    if world.place.role_rank == 0:
        world.store.set_json("start", vars(start))
        write_provenance(run, run_dir, world_size=len(world.topology.places), plan=job.plan.digest)
    world.phase("attach", world.limit.load_s)
    source: FeatureSource
    target: ProbeTarget
    if run.mode is Mode.alternate:
        engine = load_engine(job, world)
        source = AlternateSource(job, world, engine, start)
        target = LocalTarget(engine, world.device)
    else:
        trainer.warm_up()
        source = Reader(
            world.store,
            str(world.place.role_rank),
            job.spec,
            max_tokens=run.data.token_budget,
            max_sequences=run.data.max_sequences,
            num_slots=run.ring.num_slots,
            plan_digest=job.plan.digest,
            timeout_s=world.limit.load_s,
            device=world.device,
            payload=run.ring.payload.value,
            lease=run.ring.lease.value,
        )
        target = RingTarget(world, source, job.spec)
    world.phase("train", 2 * world.limit.step_s)
    finished = trainer.train(source, target)
    must_go_on = not finished and world.is_stop_foreign and world.place.local_rank == 0
    trainer.finish(finished)
    if not must_go_on:
        return os.EX_OK
    log.warning(
        "only another node was asked to stop: node %d ends with code %d, to be started again",
        world.place.node, os.EX_TEMPFAIL,
    )  # fmt: skip
    return os.EX_TEMPFAIL


def _announce(run: RunConfig, topology: Topology, run_dir: Path, world: World) -> None:
    log.debug("%s, pid is in the job's store", world.place)
    if world.place.rank == 0:
        engines = "an engine beside each" if run.mode is Mode.colocate else "engine in turn"
        log.info(
            "colospec: mode=%s, %d trainers (%s) on %s; run_dir=%s",
            run.mode.value, topology.num_trainers, engines, world.device.type, run_dir,
        )  # fmt: skip
        for note in topology.notes:
            log.info("%s", note)


def _remove_half_checkpoints(run_dir: Path, world: World) -> None:
    """Leave no unfinished checkpoint behind when the job dies; the last rank to go sees it.

    Trainer 0 writes and renames checkpoints, so the others give it a moment to end first.
    """
    if world.place.role_rank != 0:
        return
    if world.place.role is Role.ENGINE:
        time.sleep(1.0)
    clear(run_dir / "checkpoint")
