"""One rank of bench_colocate.py: the product's own engine, ring and trainer, in timed windows.

    torchrun ... benchmarks/colocate_rank.py PLAN.json

All ranks go through the same list of windows, between barriers:

- engine: engines capture into a buffer of their own, trainers idle;
- raw: the same forward passes, nothing written; a fifth as long;
- trainer: trainers learn from one buffer again and again, engines idle;
- both: engines feed trainers through the ring.

Work is counted when the device has done it: it is waited for at both ends of a window and at no
other time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from colocate_parts import Clock, LoopedSteps, LoopSource, first_rows
from torch import Tensor
from workloads import settings

from colospec import launch, log, topology
from colospec.batch import Features, TokenBatch
from colospec.config import RunConfig
from colospec.data.dataset import Dataset
from colospec.data.pack import Step
from colospec.draft import registry
from colospec.ring import RingTimeout
from colospec.ring.channel import Reader, Writer
from colospec.topology import Role
from colospec.train.job import Job, Start, lay_out, load_target
from colospec.train.memory import limit_memory
from colospec.train.produce import load_engine
from colospec.train.rank import enter_gpu
from colospec.train.stop import StopVote
from colospec.train.trainer import Trainer
from colospec.train.warm_up import random_features
from colospec.world import World, open_world

OUTSIDE = 0.05
"""Factor on the target's head rows of tokens that the draft cannot say. With random weights most
positions' likeliest token would be one of them, and the position would have no loss."""
AHEAD = 3
"""Captures that an engine alone may be ahead of its device, as it would be of its ring."""
POLL_S = 0.25


@dataclass
class Result:
    """What this rank did in one window."""

    window: str
    seconds: float
    num_samples: int
    num_tokens: int
    num_steps: int
    parts: dict[str, float]
    """Seconds per step (of an engine: per capture)."""
    metrics: dict[str, float]
    used_gib: float
    """Of the whole device, at the window's end."""


class EngineSide:
    """The windows of an engine rank."""

    def __init__(self, job: Job, world: World) -> None:
        self._job, self._world = job, world
        self._clock = Clock(world.device)
        self._engine = load_engine(job, world)
        self._own = Features.empty(job.spec, job.run.data.token_budget, world.device)
        self._sink = Writer(world.store, *ring_place(job, world), **ring_settings(job, world))
        self._alone = self._batches()
        self._for_ring = self._batches()
        self._waiting: TokenBatch | None = None

    def run(self, window: str, index: int, seconds: float) -> Result | None:
        if window == "both":
            return self._feed(index)
        if window in ("engine", "raw"):
            return self._capture(window, seconds if window == "engine" else seconds / 5)
        return None

    def close(self) -> None:
        self._sink.end()
        self._sink.close()
        self._engine.close()

    def _batches(self) -> Iterator[TokenBatch]:
        rank = self._world.place.role_rank
        for step in self._job.steps(Start()):
            yield from self._job.micro_batches(step, rank)

    def _capture(self, window: str, seconds: float) -> Result:
        clock, pending, done = self._clock, deque[Any](), list[TokenBatch]()
        began = clock.now()
        while time.monotonic() - began < seconds:
            tokens = next(self._alone)
            mark = clock.mark()
            out = first_rows(self._own, tokens.num_tokens) if window == "engine" else None
            self._engine.capture(tokens, out)
            pending.append(clock.add(mark))
            if len(pending) > AHEAD:
                clock.wait(pending.popleft())
            done.append(tokens)
            self._world.watchdog.beat()
        return self._result(window, clock.now() - began, done, {})

    def _feed(self, index: int) -> Result:
        clock, done, host = (
            self._clock,
            list[TokenBatch](),
            dict.fromkeys(("slot", "transport"), 0.0),
        )
        began = clock.now()
        while True:
            tokens = self._waiting or next(self._for_ring)
            asked = time.monotonic()
            try:
                views = self._sink.acquire(tokens, timeout_s=POLL_S)
            except RingTimeout:
                self._waiting = tokens
                if self._world.store.peek(f"bench/done/{index}") is not None:
                    break
                continue
            self._waiting = None
            host["slot"] += time.monotonic() - asked
            mark = clock.mark()
            self._engine.capture(tokens, views)
            clock.add(mark)
            complete = time.monotonic()
            self._sink.publish()
            host["transport"] += time.monotonic() - complete
            done.append(tokens)
            self._world.watchdog.beat()
        return self._result("both", clock.now() - began, done, host)

    def _result(
        self, window: str, seconds: float, done: list[TokenBatch], host: dict[str, float]
    ) -> Result:
        count = max(len(done), 1)
        parts = {"engine": self._clock.total_s() / count}
        return Result(
            window, seconds, sum(len(t.sample_ids) for t in done), sum(t.num_tokens for t in done),
            len(done), parts | {name: value / count for name, value in host.items()}, {},
            self._clock.used_gib(),
        )  # fmt: skip


class TrainerSide:
    """The windows of a trainer rank."""

    def __init__(self, job: Job, world: World, plan: dict[str, Any]) -> None:
        self._job, self._world, self._plan = job, world, plan
        self._clock = Clock(world.device)
        self._trainer = Trainer(job, world, Path(plan["directory"]) / "run")
        self._features = random_features(job.spec, job.run.data.token_budget, world.device)
        self.kept_share = self._keep_every_position()
        self._trainer.warm_up()
        self._reader = Reader(
            world.store, *ring_place(job, world), lease=job.run.ring.lease.value,
            **ring_settings(job, world),
        )  # fmt: skip
        self._ring_steps, self._loop_steps = job.steps(Start()), job.steps(Start())
        self.first_step_s: float | None = None

    def run(self, window: str, index: int, seconds: float) -> Result | None:
        if window == "trainer":
            loop = LoopSource(self._features)
            return self._train(window, LoopedSteps(self._loop_steps, loop, self._job, self._world),
                               loop, seconds)  # fmt: skip
        if window != "both":
            return None
        result = self._train(window, self._ring_steps, self._reader, seconds)
        if self._world.place.role_rank == 0:
            self._world.store.set(f"bench/done/{index}", b"1")
        return result

    def close(self) -> None:
        self._reader.close()

    def _train(self, window: str, steps: Iterator[Step], source: Any, seconds: float) -> Result:
        trainer, clock, world = self._trainer, self._clock, self._world
        for _ in range(2 * self._job.run.ring.num_slots):
            trainer.step(next(steps), source)
            world.watchdog.beat()
            if self.first_step_s is None:
                clock.now()
                self.first_step_s = time.time() - self._plan["started"]
        trainer.read_metrics()
        began = clock.now()
        trainer.times.clear()
        stop = StopVote(False)
        while not stop.wait_any():
            stop = StopVote(time.monotonic() - began > seconds)
            trainer.step(next(steps), source)
            world.watchdog.beat()
        elapsed, times = clock.now() - began, trainer.times
        parts = {name: value / times.num_steps for name, value in times.seconds().items()}
        parts["host_wait"] = times.host_wait_s / times.num_steps
        return Result(
            window, elapsed, times.num_samples, times.num_tokens, times.num_steps, parts,
            trainer.read_metrics(), clock.used_gib(),
        )  # fmt: skip

    def _keep_every_position(self) -> float:
        """Make sure that every position has a loss; returns the share that has one, of a sample."""
        draft: Any = self._trainer.draft
        if getattr(draft, "d2t", None) is None:
            return 1.0
        head: Tensor = draft.frozen_head
        factor = torch.where(draft.t2d, 1.0, OUTSIDE).to(head.dtype)
        head.mul_(factor.unsqueeze(1))
        last = self._features.last_hidden_states
        assert last is not None
        tokens = (last[:256].to(head.dtype) @ head.T).argmax(-1)
        return float(draft.t2d[tokens].float().mean())


def ring_place(job: Job, world: World) -> tuple[Any, ...]:
    return str(world.place.role_rank), job.spec


def ring_settings(job: Job, world: World) -> dict[str, Any]:
    run = job.run
    return {
        "max_tokens": run.data.token_budget,
        "max_sequences": run.data.max_sequences,
        "num_slots": run.ring.num_slots,
        "plan_digest": job.plan.digest,
        "timeout_s": world.limit.load_s,
        "device": world.device,
        "payload": run.ring.payload.value,
    }


def synthetic_job(run: RunConfig, dataset_directory: str, num_trainers: int) -> Job:
    """Make a job of data that is tokenised already."""
    target = load_target(run)
    dataset = Dataset(Path(dataset_directory), fingerprint="synthetic")
    plan = lay_out(run, dataset, fingerprint=dataset.fingerprint)
    spec = registry.features(run.draft, target)
    return Job(run, target, dataset, plan, spec, num_trainers, run.trainer.max_steps or 1)


def main() -> None:
    """Play this rank's role through all windows and leave the results in a file."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    run = settings(plan["overrides"])
    places = topology.build(
        run.mode,
        world_size=int(os.environ["WORLD_SIZE"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        visible_gpus=launch.visible_gpus(),
    )
    directory = Path(plan["directory"])
    with open_world(places, run.limit) as world:
        log.setup(directory / "run", world.place.rank)
        enter_gpu(run, world)
        world.phase("load", run.limit.load_s)
        job = synthetic_job(run, plan["dataset"], places.num_trainers)
        world.agree("plan", job.plan.digest)
        if world.place.gpu is not None:
            limit_memory(job, world)
        world.join_role()
        is_engine = world.place.role is Role.ENGINE
        side = EngineSide(job, world) if is_engine else TrainerSide(job, world, plan)
        world.phase("bench", 600.0 + 3 * plan["seconds"])
        results = []
        for index, window in enumerate(plan["windows"]):
            world.barrier(f"bench/{index}")
            world.watchdog.beat()
            result = side.run(window, index, plan["seconds"] if index else plan["warm_s"])
            if result is not None and index:
                results.append({"index": index, **vars(result)})
        world.barrier("bench/end")
        write(directory / f"rank{world.place.rank}.json", side, world, results)
        side.close()


def write(file: Path, side: Any, world: World, results: list[dict[str, Any]]) -> None:
    """Leave what this rank saw."""
    on_cuda = world.device.type == "cuda"
    facts = {
        "role": world.place.role.value,
        "role_rank": world.place.role_rank,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_cuda else 0.0,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else 0.0,
        "first_step_s": getattr(side, "first_step_s", None),
        "kept_share": getattr(side, "kept_share", None),
        "windows": results,
    }
    file.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
