"""What both ring benchmarks measure with: the ring as a transport, and a pair of processes."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist

from colospec.batch import Cursor, Features, FeatureSpec, TokenBatch
from colospec.ring.channel import Payload, Reader, Writer
from colospec.store import JobStore

MIB = 1 << 20


class Transport(Protocol):
    """Both sides have one each. The producer calls target and send, the consumer receive."""

    def target(self) -> Features:
        """Return where the producer writes the next payload."""
        ...

    def send(self) -> None:
        """Hand over what was written into `target`."""
        ...

    def receive(self, use: Callable[[Features], object]) -> None:
        """Wait for a payload, use it, give it back."""
        ...

    def close(self) -> None: ...


class Wiring:
    """What the two processes share before a transport is made."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def join(self, rank: int) -> None:
        """Make this process rank 0 (producer) or 1 (consumer) of a gloo world."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(f"{self.directory}/gloo", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)


class Ring:
    """This project's ring, views on both sides; the payload is the setting ring.payload."""

    def __init__(
        self, wiring: Wiring, spec: FeatureSpec, rows: int, is_producer: bool, *, slots: int,
        device: torch.device, payload: Payload,
    ) -> None:  # fmt: skip
        store = JobStore(dist.FileStore(f"{wiring.directory}/ring", -1))
        side = Writer if is_producer else Reader
        self._end: Any = side(
            store, f"{payload}-{slots}-{rows}", spec, max_tokens=rows, max_sequences=1,
            num_slots=slots, plan_digest="bench", timeout_s=60.0, device=device, payload=payload,
        )  # fmt: skip
        ids, mask = torch.zeros(rows, dtype=torch.int64), torch.ones(rows).bool()
        self._tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [mask])
        _ = self._tokens.digest

    def target(self) -> Features:
        return self._end.acquire(self._tokens, timeout_s=60.0)  # type: ignore[no-any-return]

    def send(self) -> None:
        self._end.publish()

    def receive(self, use: Callable[[Features], object]) -> None:
        with self._end.acquire(timeout_s=60.0) as lease:
            use(lease.features)

    def close(self) -> None:
        if isinstance(self._end, Writer):
            self._end.end()
        self._end.close()


def hand_over(
    transport: Transport,
    write: Callable[[Features], object],
    finish: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Produce a payload by `write`, which is done after `finish`, and send it; returns the moment
    when it was complete, and the seconds that sending took the host."""
    write(transport.target())
    finish()
    complete = time.monotonic()
    transport.send()
    return complete, time.monotonic() - complete


def one_by_one(
    count: int, send_one: Callable[[], tuple[float, float]], pipe: Connection
) -> tuple[list[float], list[float]]:
    """Send payloads by `hand_over`, one in flight; returns the seconds of each until the consumer,
    which tells by `pipe`, had it, and those that sending took the host."""
    latencies, hosts = [], []
    for _ in range(count):
        complete, host_s = send_one()
        hosts.append(host_s)
        latencies.append(pipe.recv() - complete)
    return latencies, hosts


@contextmanager
def consumer(
    connect: Callable[[str], Wiring], consume: Callable[[Any, Connection], None]
) -> Iterator[tuple[Any, Connection]]:
    """Run `consume` in a process of its own; gives the producer's ends."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-ring-") as directory:
        wiring = connect(directory)
        here, there = context.Pipe()
        process = context.Process(target=consume, args=(wiring, there))
        process.start()
        there.close()
        try:
            wiring.join(0)
            yield wiring, here
            dist.destroy_process_group()
            process.join(20)
        finally:
            process.kill()
            process.join()
