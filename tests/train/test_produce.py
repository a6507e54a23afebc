"""How engine ranks fill slots: alone, and as the ranks of a tensor-parallel replica."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from colospec.batch import Cursor, Features, FeatureSpec, TokenBatch
from colospec.config import Mode
from colospec.ring import Closed
from colospec.topology import Place, build
from colospec.train.job import Evaluation, Start
from colospec.train.produce import all_acquired, produce
from tests.ranks import run_ranks

STEPS, ACCUMULATION = 3, 2
PROBE = Evaluation(epoch=0, step=1, bins=(), num_loss_tokens=0, has_probe=True)


@dataclass
class Plan:
    """Steps of random micro-batches, the same on all ranks."""

    num_trainers: int
    seed: int
    probe_after: int | None = None

    def work(self, _start: Start) -> Iterator[tuple[int, Evaluation | None]]:
        for step in range(STEPS):
            yield step, PROBE if step == self.probe_after else None

    def micro_batches(self, step: int | Evaluation, trainer: int) -> Any:
        if isinstance(step, Evaluation):
            return
        for index in range(trainer, self.num_trainers * ACCUMULATION, self.num_trainers):
            draw = random.Random(f"{self.seed} {step} {index}")
            number = step * self.num_trainers * ACCUMULATION + index
            ids = torch.tensor([draw.randrange(100) for _ in range(draw.randrange(9))])
            mask = torch.ones(len(ids), dtype=torch.bool)
            yield TokenBatch.pack(Cursor(0, number, step), (number,), [ids], [mask])


@dataclass
class Engine:
    """Writes last hidden states of 7 alone; remembers who asked for what."""

    calls: list[tuple[int, bool]] = field(default_factory=list)
    spec: ClassVar[FeatureSpec] = FeatureSpec((0,), False, 1, torch.float32)

    def capture(self, tokens: TokenBatch, out: Features | None) -> None:
        self.calls.append((tokens.cursor.micro_batch, out is not None))
        if out is not None and out.last_hidden_states is not None:
            out.last_hidden_states.fill_(7)


@dataclass
class Sink:
    """A trainer that closes the ring at the n-th acquire or publish, or acquires slowly."""

    closes_at_acquire: int | None = None
    closes_at_publish: int | None = None
    slow_s: float = 0.0
    acquired: int = 0
    published: list[int] = field(default_factory=list)
    ended: bool = False
    filled: list[list[float]] = field(default_factory=list)
    _current: int | None = None
    _views: torch.Tensor | None = None

    def acquire(self, tokens: TokenBatch, *, timeout_s: float) -> Features:
        time.sleep(min(self.slow_s, timeout_s))
        if self.acquired == self.closes_at_acquire:
            raise Closed("closed")
        self.acquired += 1
        self._current = tokens.cursor.micro_batch
        self._views = torch.zeros(tokens.num_tokens, 1)
        return Features(self._views, None)

    def publish(self) -> None:
        if len(self.published) == self.closes_at_publish:
            raise Closed("closed")
        assert self._current is not None
        assert self._views is not None
        self.filled.append(self._views.flatten().tolist())
        self.published.append(self._current)

    def end(self) -> None:
        self.ended = True


def place(rank: int, *, tp: int, pairs: int) -> Place:
    """The engine rank `rank` of a job of `pairs` pairs on CPUs."""
    ranks = build(
        Mode.colocate, world_size=2 * pairs, local_world_size=2 * pairs, visible_gpus=0, tp=tp
    )
    return ranks.places[pairs + rank]


def run(
    here: Place,
    seed: int,
    sink: Sink,
    *,
    step_s: float = 30.0,
    probe_after: int | None = None,
    requests: Sequence[Any] = (),
) -> Engine:
    def get_json(key: str, *, timeout_s: float) -> Any:
        assert timeout_s > step_s, "a trainer that saves is waited for"
        return requests[int(key.removeprefix("probe/"))]

    world = SimpleNamespace(
        place=here,
        limit=SimpleNamespace(step_s=step_s, checkpoint_s=60.0),
        device=torch.device("cpu"),
        watchdog=SimpleNamespace(beat=lambda: None),
        store=SimpleNamespace(set_json=lambda *_: None, get_json=get_json),
    )
    engine = Engine()
    job: Any = Plan(here.role_size, seed, probe_after)
    produce(job, world, engine, sink, Start())  # type: ignore[arg-type]
    # A tensor would be returned through the memory of a process that ends.
    sink._views = None
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


REQUESTS = [[5, 6, 8], [9], True, False]
"""Two texts of the first probe, its end, and the end of training in place of a second one."""


def test_a_probe_comes_where_the_plan_has_it_with_last_states_in_slots_of_their_own(
    seed: int,
) -> None:
    sink = Sink()
    engine = run(place(0, tp=1, pairs=1), seed, sink, probe_after=0, requests=REQUESTS)
    assert [number for number, _ in engine.calls] == [0, 1, 0, 1, 2, 3, 4, 5]
    assert sink.published == [0, 1, 0, 0, 1, 1, 2, 3, 4, 5]
    assert sink.filled[2:6] == [[0, 0, 0], [7, 7, 7], [0], [7]]
    assert sink.ended


def test_a_trainer_that_stops_before_a_probe_ends_the_engine(seed: int) -> None:
    sink = Sink(closes_at_acquire=2)
    run(place(0, tp=1, pairs=1), seed, sink, probe_after=0, requests=[False])
    assert sink.published == [0, 1]
    assert not sink.ended


def probed_replica(rank: int, seed: int, first: int) -> tuple[list[tuple[int, bool]], Sink]:
    sink = Sink()
    here = place(first + rank, tp=2, pairs=4)
    return run(here, seed, sink, probe_after=0, requests=REQUESTS).calls, sink


@pytest.mark.parametrize("replica", [0, 1])
def test_all_ranks_of_the_first_replica_alone_take_part_in_a_probe(seed: int, replica: int) -> None:
    probe = [(0, True), (1, True)] if replica == 0 else []
    (ours, sink), (others, silent) = run_ranks(probed_replica, 2, seed, 2 * replica)
    after_a_step = ACCUMULATION * 2
    assert ours[after_a_step : after_a_step + len(probe)] == probe
    assert len(ours) == len(others) == STEPS * after_a_step + len(probe)
    assert others[after_a_step : after_a_step + len(probe)] == [(n, False) for n, _ in probe]
    assert len(sink.published) == STEPS * ACCUMULATION + 2 * len(probe)
    assert len(silent.published) == STEPS * ACCUMULATION


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
