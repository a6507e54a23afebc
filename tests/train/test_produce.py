"""How engine ranks fill slots: alone, and as the ranks of a tensor-parallel replica."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colospec.batch import Cursor, Features, TokenBatch
from colospec.config import Mode
from colospec.ring import Closed
from colospec.topology import Place, build
from colospec.train.job import Start
from colospec.train.produce import all_acquired, produce
from tests.ranks import run_ranks

STEPS, ACCUMULATION = 3, 2


@dataclass
class Plan:
    """Steps of random micro-batches, the same on all ranks."""

    num_trainers: int
    seed: int

    def work(self, _start: Start) -> Iterator[tuple[int, None]]:
        return ((step, None) for step in range(STEPS))

    def micro_batches(self, step: int, trainer: int) -> Any:
        for index in range(trainer, self.num_trainers * ACCUMULATION, self.num_trainers):
            draw = random.Random(f"{self.seed} {step} {index}")
            number = step * self.num_trainers * ACCUMULATION + index
            ids = torch.tensor([draw.randrange(100) for _ in range(draw.randrange(9))])
            mask = torch.ones(len(ids), dtype=torch.bool)
            yield TokenBatch.pack(Cursor(0, number, step), (number,), [ids], [mask])


@dataclass
class Engine:
    """Writes nothing; remembers who asked for what."""

    calls: list[tuple[int, bool]] = field(default_factory=list)

    def capture(self, tokens: TokenBatch, out: Features | None) -> None:
        self.calls.append((tokens.cursor.micro_batch, out is not None))


@dataclass
class Sink:
    """A trainer that closes the ring at the n-th acquire or publish, or acquires slowly."""

    closes_at_acquire: int | None = None
    closes_at_publish: int | None = None
    slow_s: float = 0.0
    acquired: int = 0
    published: list[int] = field(default_factory=list)
    ended: bool = False
    _current: int | None = None

    def acquire(self, tokens: TokenBatch, *, timeout_s: float) -> Features:
        time.sleep(min(self.slow_s, timeout_s))
        if self.acquired == self.closes_at_acquire:
            raise Closed("closed")
        self.acquired += 1
        self._current = tokens.cursor.micro_batch
        return Features(torch.empty(tokens.num_tokens, 1), None)

    def publish(self) -> None:
        if len(self.published) == self.closes_at_publish:
            raise Closed("closed")
        assert self._current is not None
        self.published.append(self._current)

    def end(self) -> None:
        self.ended = True


def place(rank: int, *, tp: int, pairs: int) -> Place:
    """The engine rank `rank` of a job of `pairs` pairs on CPUs."""
    ranks = build(
        Mode.colocate, world_size=2 * pairs, local_world_size=2 * pairs, visible_gpus=0, tp=tp
    )
    return ranks.places[pairs + rank]


def run(here: Place, seed: int, sink: Sink, *, step_s: float = 30.0) -> Engine:
    world = SimpleNamespace(
        place=here,
        limit=SimpleNamespace(step_s=step_s),
        device=torch.device("cpu"),
        watchdog=SimpleNamespace(beat=lambda: None),
        store=SimpleNamespace(set_json=lambda *_: None),
    )
    engine = Engine()
    job: Any = Plan(here.role_size, seed)
    produce(job, world, engine, sink, Start())  # type: ignore[arg-type]
    return engine


def expected(here: Place) -> list[tuple[int, bool]]:
    """All micro-batches of the replica's trainers, in order, and which of them are ours."""
    first, pairs = here.replica * here.tp_size, here.role_size
    calls = []
    for begin in range(0, STEPS * ACCUMULATION * pairs, pairs):
        calls += [(begin + first + t, t == here.tp_rank) for t in range(here.tp_size)]
    return calls


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(1 << 30)


def test_one_rank_fills_its_own_slots_without_a_process_group(seed: int) -> None:
    assert not dist.is_initialized()
    here, sink = place(2, tp=1, pairs=3), Sink()
    engine = run(here, seed, sink)
    assert engine.calls == expected(here)
    assert sink.published == [micro_batch for micro_batch, _ in engine.calls]
    assert sink.ended


@pytest.mark.parametrize("closing", ["closes_at_acquire", "closes_at_publish"])
def test_one_rank_stops_when_its_trainer_closes_the_ring(seed: int, closing: str) -> None:
    sink = Sink(**{closing: 2})
    run(place(0, tp=1, pairs=1), seed, sink)
    assert len(sink.published) == 2
    assert not sink.ended


def replica(rank: int, seed: int, sinks: list[Sink]) -> tuple[list[tuple[int, bool]], Sink]:
    # The second of two replicas.
    return run(place(2 + rank, tp=2, pairs=4), seed, sinks[rank]).calls, sinks[rank]


def test_ranks_of_a_replica_run_all_their_micro_batches_and_write_their_own(seed: int) -> None:
    results = run_ranks(replica, 2, seed, [Sink(slow_s=0.1), Sink()])
    for rank, (calls, sink) in enumerate(results):
        here = place(2 + rank, tp=2, pairs=4)
        assert calls == expected(here)
        assert sink.published == [micro_batch for micro_batch, is_own in calls if is_own]
        assert sink.ended


@pytest.mark.parametrize("closing", ["closes_at_acquire", "closes_at_publish"])
def test_all_ranks_of_a_replica_stop_when_one_trainer_closes(seed: int, closing: str) -> None:
    results = run_ranks(replica, 2, seed, [Sink(), Sink(**{closing: 3})])
    (calls, sink), (same, closed) = results
    assert [number for number, _ in calls] == [number for number, _ in same]
    assert len(closed.published) == 3
    assert len(sink.published) in (3, 4)
    assert not sink.ended
    assert not closed.ended


def waits_for_a_slow_trainer(rank: int) -> str:
    here = place(rank, tp=2, pairs=2)
    if rank == 1:
        time.sleep(4)
        return ""
    try:
        all_acquired(here, True, 1.0)
    except TimeoutError as error:
        return str(error)
    return "no error"


def test_a_rank_without_a_slot_is_named_in_time() -> None:
    text, _ = run_ranks(waits_for_a_slow_trainer, 2)
    assert "rank 2 (engine 0 on cpu): tensor-parallel ranks [1] of engine replica 0" in text
    assert "within 1 s" in text
