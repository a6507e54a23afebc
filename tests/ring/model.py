"""The ring's protocol as a state machine of four actors, searched exhaustively.

Actors: the engine's host and its stream, the trainer's host and its stream. Hosts enqueue work that
streams do later, in order; either process may die before any step, and its stream may then stop
anywhere. Memory is sequentially consistent (the sanitizer runs cover the memory order of the C).

    python -m tests.ring.model     # searches the protocol and all mutants
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

MUTANTS = (
    "record_without_number",
    "host_side_release",
    "header_before_release",
    "early_publish",
    "overrun",
    "fail_before_drain",
    "look_after_check",
    "free_before_detach",
)


class State(NamedTuple):
    # Shared memory.
    published: int = 0
    released: int = 0
    headers: tuple = ()  # sequence number by slot
    payload: tuple = ()  # (sequence number, is complete) by slot
    record: tuple | None = None  # ("end" | "error", its number)
    close: int | None = None  # the number of the CLOSE record
    freed: bool = False
    # The engine: what its host does next, and for which sequence number; its stream's queue.
    engine: str = "acquire"
    seq: int = 0
    engine_stream: tuple = ()
    published_at_death: int | None = None
    # The trainer.
    trainer: str = "wait"
    taken: int = 0
    leases: int = 0
    trainer_stream: tuple = ()
    is_dead: bool = False
    got: tuple = ()  # sequence numbers whose payload the stream has used


class Violation(Exception):
    """The protocol broke a promise."""


ENGINE_OVER = ("closed", "done", "gone", "dead")
TRAINER_OVER = ("none", "failed", "died", "left", "dead")


def put(items: tuple, index: int, value: object) -> tuple:
    return (*items[:index], value, *items[index + 1 :])


class Search:
    """All states reachable with `num_slots` slots and `total` micro-batches."""

    def __init__(self, num_slots: int, total: int, mutant: str | None = None) -> None:
        assert mutant is None or mutant in MUTANTS
        self.num_slots = num_slots
        self.total = total
        self.mutant = mutant

    def run(self) -> int:
        """Return the number of states. Raises Violation with the first bad state."""
        empty = (None,) * self.num_slots
        first = State(headers=empty, payload=empty)
        seen, queue = {first}, deque([first])
        while queue:
            state = queue.popleft()
            following = [*self.engine(state), *self.engine_stream(state)]
            following += [*self.trainer(state), *self.trainer_stream(state)]
            if not following:
                self.check_final(state)
            for each in following:
                if each not in seen:
                    seen.add(each)
                    queue.append(each)
        return len(seen)

    def check_final(self, s: State) -> None:
        if s.engine not in ENGINE_OVER or s.trainer not in TRAINER_OVER:
            raise Violation(f"deadlock: {s}")

    def engine(self, s: State):
        if s.engine in ENGINE_OVER:
            return
        yield s._replace(engine="dead", published_at_death=s.published)
        if s.engine in ("acquire", "drain") and s.close is not None and s.close == s.released:
            yield s._replace(engine="closed", freed=True)
        if s.engine in ("acquire", "drain") and s.is_dead:
            yield s._replace(engine="gone", freed=True)
        if s.engine == "drain":
            if self.mutant == "free_before_detach":
                yield s._replace(engine="done", freed=True)
            return
        slot = s.seq % self.num_slots
        if s.engine == "acquire":
            yield s._replace(engine="drain", record=("error", s.seq))
            if s.seq == self.total:
                yield s._replace(engine="drain", record=("end", s.seq))
                return
            limit = self.num_slots + (self.mutant == "overrun")
            headers = s.headers
            if self.mutant == "header_before_release":
                headers = put(headers, slot, s.seq)
                if headers != s.headers:
                    yield s._replace(headers=headers)
            if s.seq - s.released < limit:
                yield s._replace(engine="enqueue", headers=put(headers, slot, s.seq))
        if s.engine == "enqueue":
            work = (("fill", s.seq), ("filled", s.seq), ("publish", s.seq + 1))
            published = s.published
            if self.mutant == "early_publish":
                work, published = work[:2], s.seq + 1
            yield s._replace(
                engine="acquire",
                seq=s.seq + 1,
                published=published,
                engine_stream=s.engine_stream + work,
            )

    def engine_stream(self, s: State):
        if not s.engine_stream:
            return
        if s.engine == "dead":
            yield s._replace(engine_stream=())
        (verb, number), rest = s.engine_stream[0], s.engine_stream[1:]
        if verb == "publish":
            yield s._replace(published=number, engine_stream=rest)
        else:
            payload = put(s.payload, number % self.num_slots, (number, verb == "filled"))
            yield s._replace(payload=payload, engine_stream=rest)

    def trainer(self, s: State):
        if s.trainer in TRAINER_OVER:
            return
        yield s._replace(trainer="dead", is_dead=True)
        if s.leases:
            yield self.release(s)
        else:
            yield s._replace(trainer="left", close=s.taken)
        if s.trainer == "stuck":
            if s.engine == "dead":
                yield self.give_up(s)
            else:
                yield s._replace(trainer="wait")
        if s.published > s.taken:
            if s.leases < self.num_slots:
                yield self.take(s)
            if self.mutant == "fail_before_drain" and s.engine == "dead":
                yield self.give_up(s)
            return
        if s.record and (s.record[1] == s.taken or self.mutant == "record_without_number"):
            yield self.finish(s)
        elif s.trainer == "sure":
            yield self.give_up(s)
        elif self.mutant == "look_after_check":
            yield s._replace(trainer="stuck")
        elif s.engine == "dead":
            # The look at the peer comes first; the next step checks the counters again.
            yield s._replace(trainer="sure")

    def take(self, s: State) -> State:
        if s.headers[s.taken % self.num_slots] != s.taken:
            raise Violation(f"header of another micro-batch: {s}")
        return s._replace(
            trainer="wait",
            taken=s.taken + 1,
            leases=s.leases + 1,
            trainer_stream=(*s.trainer_stream, ("use", s.taken)),
        )

    def release(self, s: State) -> State:
        number = s.taken - s.leases + 1
        if self.mutant == "host_side_release":
            return s._replace(leases=s.leases - 1, released=number)
        stream = (*s.trainer_stream, ("release", number))
        return s._replace(leases=s.leases - 1, trainer_stream=stream)

    def finish(self, s: State) -> State:
        kind, _ = s.record
        if s.taken != (self.total if kind == "end" else s.record[1]):
            raise Violation(f"slots lost before {kind}: {s}")
        return self.let_go(s, "none" if kind == "end" else "failed")

    def give_up(self, s: State) -> State:
        if s.taken < s.published_at_death:
            raise Violation(f"published slots lost after a death: {s}")
        return self.let_go(s, "died")

    def let_go(self, s: State, outcome: str) -> State:
        while s.leases:
            s = self.release(s)
        return s._replace(trainer=outcome, close=s.taken)

    def trainer_stream(self, s: State):
        if not s.trainer_stream:
            return
        if s.is_dead:
            yield s._replace(trainer_stream=())
        (verb, number), rest = s.trainer_stream[0], s.trainer_stream[1:]
        if verb == "release":
            yield s._replace(released=number, trainer_stream=rest)
            return
        if s.is_dead:
            yield s._replace(trainer_stream=rest)
            return
        if s.freed:
            raise Violation(f"use of freed memory: {s}")
        if s.payload[number % self.num_slots] != (number, True):
            raise Violation(f"torn or overwritten payload under lease {number}: {s}")
        if number != len(s.got):
            raise Violation(f"out of order: {s}")
        yield s._replace(got=(*s.got, number), trainer_stream=rest)


if __name__ == "__main__":
    for slots in (1, 2, 3):
        print(f"{slots} slots: {Search(slots, 4).run()} states, no violation")  # noqa: T201
    for name in MUTANTS:
        try:
            print(f"{name}: NOT CAUGHT in {Search(2, 4, name).run()} states")  # noqa: T201
        except Violation as violation:
            print(f"{name}: {str(violation).split(':')[0]}")  # noqa: T201
