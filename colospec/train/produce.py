"""The engine's side of a run: capture features for one trainer's micro-batches, in order."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from colospec.batch import Cursor, Features, FeatureSink, FeatureSource, Lease, TokenBatch
from colospec.engine.base import Engine, open_engine
from colospec.ring import Closed, RingTimeout
from colospec.ring.local import LocalChannel
from colospec.topology import Place
from colospec.train.job import Evaluation, Job, Start
from colospec.train.requests import Requests
from colospec.world import World

log = logging.getLogger(__name__)
REPORT_S = 1.0
BUSY_PHASES = (b"checkpoint", b"probe")
"""Phases of a trainer in which it takes no slots for a long time."""


def load_engine(job: Job, world: World) -> Engine:
    """Load the target on this rank's device."""
    run = job.run
    return open_engine(
        run.engine,
        job.target,
        job.spec,
        weights=run.target.weights,
        trust_remote_code=run.target.trust_remote_code,
        device=world.device,
        max_tokens=run.data.token_budget,
        max_sequences=run.data.max_sequences,
        max_length=run.data.max_length,
    )


def produce(job: Job, world: World, engine: Engine, sink: FeatureSink, start: Start) -> None:
    """Fill slots until the plan ends or the trainer closes the ring (either is success).

    The tp ranks of an engine replica run tp forward passes together, one micro-batch of each of
    their trainers; rank t publishes the t-th. All have a slot before the first forward pass: none
    may wait for its trainer while the others wait for it inside an all-reduce.
    """
    place, timeout_s = world.place, world.limit.step_s
    rate, requests = CaptureRate(world), Requests(world.store)
    wanted = True
    for parts in replica_batches(job, place, start):
        if isinstance(parts, Evaluation):
            wanted = serve_probe(requests, world, engine, sink) and wanted
            continue
        own = parts[place.tp_rank]
        views = _acquire(sink, own, world) if wanted else None
        if place.tp_size > 1 and not all_acquired(place, views is not None, 1.5 * timeout_s):
            views = None
        if views is None:
            log.info("the trainer needs no more features")
            return
        with rate.capture(own):
            for index, tokens in enumerate(parts):
                engine.capture(tokens, views if index == place.tp_rank else None)
            wanted = _publish(sink)
        world.watchdog.beat()
    if wanted:
        sink.end()


def replica_batches(
    job: Job, place: Place, start: Start
) -> Iterator[tuple[TokenBatch, ...] | Evaluation]:
    """Yield one micro-batch for each trainer of this rank's replica, in the order of its ranks, and
    in the first replica each evaluation in which trainer 0 will ask for captures of its own."""
    first = place.replica * place.tp_size
    trainers = range(first, first + place.tp_size)
    for step, evaluation in job.work(start):
        for part in (step, evaluation):
            if part is not None:
                yield from zip(*(job.micro_batches(part, t) for t in trainers), strict=True)
        if evaluation is not None and evaluation.has_probe and place.replica == 0:
            yield evaluation


def serve_probe(requests: Requests, world: World, engine: Engine, sink: FeatureSink) -> bool:
    """Capture what trainer 0 asks for, until it has enough; False where it trains no more.

    All ranks of the replica read the same requests and run the same forward passes; the first one
    publishes. A draft that asks for no last hidden states has no room for them in its slots, and a
    probe needs them: they follow in a slot of their own, in the columns of the first aux layer.
    """
    timeout_s = world.limit.step_s + world.limit.checkpoint_s
    while isinstance(tokens := requests.take(timeout_s=timeout_s), TokenBatch):
        world.watchdog.beat()
        if world.place.tp_rank != 0:
            engine.capture(tokens, None)
            continue
        views = sink.acquire(tokens, timeout_s=timeout_s)
        if views.last_hidden_states is not None:
            engine.capture(tokens, views)
            sink.publish()
            continue
        spec, aux = engine.spec, views.aux_hidden_states
        last = torch.empty(len(aux), spec.hidden_size, dtype=spec.dtype, device=aux.device)
        engine.capture(tokens, Features(aux, last))
        sink.publish()
        views = sink.acquire(tokens, timeout_s=timeout_s)
        views.aux_hidden_states[:, : spec.hidden_size].copy_(last)
        sink.publish()
    world.watchdog.beat()
    return tokens


def all_acquired(place: Place, acquired: bool, timeout_s: float) -> bool:
    """Tell whether every rank of this replica has a slot; all of them call this together.

    Raises TimeoutError, naming them, where some rank does not come within `timeout_s`.
    """
    status = torch.tensor([int(acquired)], dtype=torch.int32)
    work = dist.all_reduce(status, op=dist.ReduceOp.MIN, async_op=True)
    assert work is not None
    try:
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        others = [t for t in range(place.tp_size) if t != place.tp_rank]
        raise TimeoutError(
            f"{place}: tensor-parallel ranks {others} of engine replica {place.replica} did not "
            f"all get a slot of their rings within {timeout_s:g} s ({error}); one of their "
            "trainers is slow or gone; see limit.step_s"
        ) from error
    return bool(status.item())


def _acquire(sink: FeatureSink, tokens: TokenBatch, world: World) -> Features | None:
    """Wait for a free slot; None once the trainer has closed the ring.

    A trainer that saves or probes is given the time that this may take.
    """
    try:
        try:
            return sink.acquire(tokens, timeout_s=world.limit.step_s)
        except RingTimeout:
            if world.store.peek(f"phase/{world.place.peer}") not in BUSY_PHASES:
                raise
            return sink.acquire(tokens, timeout_s=world.limit.checkpoint_s)
    except Closed:
        return None


def _publish(sink: FeatureSink) -> bool:
    """Hand the slot over; False where the trainer has closed the ring meanwhile."""
    try:
        sink.publish()
    except Closed:
        return False
    return True


class CaptureRate:
    """Tells the trainers what this engine could do: tokens per second of capture time.

    On CUDA that is time of the device: the host is ahead of it.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._tokens = 0
        self._busy_s = 0.0
        self._reported = time.monotonic()
        self._running: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def capture(self, tokens: TokenBatch) -> Iterator[None]:
        """Count what happens inside as one capture; publish the rate about once a second."""
        if self._world.device.type == "cuda":
            begin, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            begin.record()
            yield
            end.record()
            self._running.append((tokens.num_tokens, begin, end))
            while self._running and self._running[0][2].query():  # type: ignore[no-untyped-call]
                number, begin, end = self._running.popleft()
                self._count(number, begin.elapsed_time(end) / 1e3)
        else:
            began = time.monotonic()
            yield
            self._count(tokens.num_tokens, time.monotonic() - began)

    def _count(self, num_tokens: int, seconds: float) -> None:
        self._tokens += num_tokens
        self._busy_s += seconds
        now = time.monotonic()
        if now - self._reported > REPORT_S:
            rate = self._tokens / max(self._busy_s, 1e-9)
            self._world.store.set_json(f"engine_rate/{self._world.place.role_rank}", rate)
            self._tokens, self._busy_s, self._reported = 0, 0.0, now


class AlternateSource(FeatureSource):
    """A source that runs the engine itself, one micro-batch at a time, in this very process.

    The features go through an in-process slot with the ring's lease rules, so that a trainer cannot
    tell the difference: the oracle for colocate mode, and the fallback without MPS.
    """

    def __init__(self, job: Job, world: World, engine: Engine, start: Start) -> None:
        self._engine = engine
        self._channel = LocalChannel(
            job.spec,
            max_tokens=job.run.data.token_budget,
            lease=job.run.ring.lease.value,
            device=world.device,
        )
        self._rate = CaptureRate(world)
        self._batches = (
            tokens
            for parts in job.work(start)
            for part in parts
            if part is not None
            for tokens in job.micro_batches(part, world.place.role_rank)
        )

    def acquire(self, *, timeout_s: float) -> Lease | None:
        """Capture the next micro-batch and lease it; None after the last."""
        tokens = next(self._batches, None)
        if tokens is None:
            self._channel.writer.end()
        else:
            views = self._channel.writer.acquire(tokens, timeout_s=timeout_s)
            with self._rate.capture(tokens):
                self._engine.capture(tokens, views)
                self._channel.writer.publish()
        return self._channel.reader.acquire(timeout_s=timeout_s)

    def close(self) -> None:
        """Free the slot and the engine."""
        self._channel.reader.close()
        self._channel.writer.close()
        self._engine.close()


def check_lease(lease: Lease, tokens: TokenBatch) -> None:
    """Raise RuntimeError unless the slot holds the features of exactly these tokens."""
    expected: tuple[Cursor, int] = (tokens.cursor, tokens.digest)
    if (lease.cursor, lease.digest) != expected:
        raise RuntimeError(
            f"the engine sent features of {lease.cursor} (digest {lease.digest:016x}), "
            f"but {tokens.cursor} (digest {tokens.digest:016x}) is next"
        )
