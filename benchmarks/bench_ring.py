"""How features travel between two processes: the ring against the usual ways, in one run.

    python benchmarks/bench_ring.py [--tiny] [--out FILE]

A producer and a consumer process on one host, in its memory (bench_ring_gpu.py measures that of a
GPU); the consumer sums every payload, in place where the transport allows it. Per transport and
size:

- latency_ms: from the moment the features are complete in the producer until the consumer has
  summed them, one payload in flight (CLOCK_MONOTONIC in both processes).
- stall_ms: how long the producer stands still to hand a complete payload over. The ring's producer
  writes features into the slot to begin with, the others into memory of their own.
- gb_per_s: payload bytes over the time of a stream of payloads, with production and sum.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as torch_mp
from ring_parts import MIB, Ring, Transport, Wiring, consumer, hand_over, one_by_one
from torch import Tensor

from colospec.batch import Features, FeatureSpec

SIZES_MIB = (1, 4, 16, 64, 256)
WIDTH = 4096
NUM_SLOTS = 3
CPU = torch.device("cpu")
SPEC = FeatureSpec((0,), last_hidden_states=False, hidden_size=WIDTH, dtype=torch.float32)


class Queues(Wiring):
    """Queues beside the ring."""

    def __init__(self, directory: str, sizes_mib: tuple[int, ...] = SIZES_MIB) -> None:
        super().__init__(directory)
        self.sizes_mib = sizes_mib
        self.pickles: Any = mp.get_context("spawn").Queue(NUM_SLOTS)
        self.tensors: Any = torch_mp.get_context("spawn").Queue(NUM_SLOTS)


class Private:
    """The producer writes into memory of its own, `_work`."""

    _work: Tensor

    def target(self) -> Features:
        return Features(self._work, None)

    def close(self) -> None: ...


class PickleQueue(Private):
    """multiprocessing.Queue: the payload's bytes through a pickle and a pipe."""

    def __init__(self, wiring: Queues, num_rows: int, is_producer: bool) -> None:
        self._queue = wiring.pickles
        self._work = torch.empty(num_rows if is_producer else 0, WIDTH)

    def send(self) -> None:
        self._queue.put(self._work.numpy().tobytes())

    def receive(self, use: Callable[[Features], object]) -> None:
        payload = bytearray(self._queue.get(timeout=60))
        use(Features(torch.frombuffer(payload, dtype=torch.float32), None))


class SharedTensorQueue(Private):
    """torch.multiprocessing.Queue: a new shared-memory tensor for every payload."""

    def __init__(self, wiring: Queues, num_rows: int, is_producer: bool) -> None:
        self._queue = wiring.tensors
        self._shape = (num_rows if is_producer else 0, WIDTH)

    def target(self) -> Features:
        self._work = torch.empty(self._shape).share_memory_()
        return super().target()

    def send(self) -> None:
        self._queue.put(self._work)

    def receive(self, use: Callable[[Features], object]) -> None:
        use(Features(self._queue.get(timeout=60), None))


class Gloo(Private):
    """torch.distributed send and receive over loopback TCP."""

    def __init__(self, _wiring: Queues, num_rows: int, is_producer: bool) -> None:
        self._peer = int(is_producer)
        self._work = torch.empty(num_rows, WIDTH)

    def send(self) -> None:
        dist.send(self._work, self._peer)

    def receive(self, use: Callable[[Features], object]) -> None:
        dist.recv(self._work, self._peer)
        use(Features(self._work, None))


def _ring(wiring: Wiring, num_rows: int, is_producer: bool) -> Ring:
    return Ring(wiring, SPEC, num_rows, is_producer, slots=NUM_SLOTS, device=CPU, payload="auto")


TRANSPORTS: dict[str, Callable[[Queues, int, bool], Transport]] = {
    "ring": _ring,
    "multiprocessing.Queue": PickleQueue,
    "torch shared tensor queue": SharedTensorQueue,
    "gloo send/recv": Gloo,
}


def counts(size_mib: int) -> tuple[int, int]:
    """Payloads for latency and for throughput."""
    return max(4, min(100, 200 // size_mib)), max(4, min(100, 800 // size_mib))


def consume(wiring: Queues, pipe: Connection) -> None:
    """Be the consumer: follow the order of cases in which the parent produces."""
    torch.set_num_threads(1)
    wiring.join(1)
    for make in TRANSPORTS.values():
        for size_mib in wiring.sizes_mib:
            transport = make(wiring, rows(size_mib), False)
            num_latency, num_stream = counts(size_mib)
            for _ in range(NUM_SLOTS + num_latency + num_stream):
                transport.receive(lambda payload: float(payload.aux_hidden_states.sum()))
                pipe.send(time.monotonic())
            transport.close()
    dist.destroy_process_group()


def produce(wiring: Queues, pipe: Connection, name: str, size_mib: int) -> dict[str, Any]:
    """Measure one transport at one size."""
    source = torch.rand(rows(size_mib), WIDTH)
    transport = TRANSPORTS[name](wiring, rows(size_mib), True)

    def send_one() -> tuple[float, float]:
        return hand_over(transport, lambda out: out.aux_hidden_states.copy_(source))

    num_latency, num_stream = counts(size_mib)
    latencies, _ = one_by_one(NUM_SLOTS + num_latency, send_one, pipe)
    # The first payloads touch fresh memory on both sides.
    latencies = sorted(latencies[NUM_SLOTS:])
    began = time.monotonic()
    stalls = [send_one()[1] for _ in range(num_stream)]
    ended = [pipe.recv() for _ in range(num_stream)][-1]
    transport.close()
    return {
        "transport": name,
        "size_mib": size_mib,
        "payloads": num_stream,
        "gb_per_s": num_stream * size_mib * MIB / (ended - began) / 1e9,
        "latency_ms": statistics.median(latencies) * 1e3,
        "latency_p99_ms": latencies[len(latencies) * 99 // 100] * 1e3,
        "stall_ms": statistics.median(stalls) * 1e3,
    }


def rows(size_mib: int) -> int:
    return size_mib * MIB // (WIDTH * 4)


def run_cases(sizes_mib: tuple[int, ...]) -> list[dict[str, Any]]:
    """Run everything; print a line per case."""
    print(f"{'transport':27}{'MiB':>5}{'GB/s':>8}{'latency ms':>12}{'p99':>9}{'stall ms':>10}")
    results = []
    with consumer(lambda directory: Queues(directory, sizes_mib), consume) as (wiring, pipe):
        for name in TRANSPORTS:
            for size_mib in sizes_mib:
                row = produce(wiring, pipe, name, size_mib)
                results.append(row)
                print(
                    f"{name:27}{size_mib:5d}{row['gb_per_s']:8.2f}{row['latency_ms']:12.3f}"
                    f"{row['latency_p99_ms']:9.3f}{row['stall_ms']:10.3f}",
                    flush=True,
                )
    return results


def main() -> None:
    """Run all cases, print the table, write the JSON."""
    arguments = record.parser(__doc__, tiny="the smallest payload alone").parse_args()
    torch.set_num_threads(1)
    results = run_cases(SIZES_MIB[:1] if arguments.tiny else SIZES_MIB)
    kept = {"benchmark": "ring", **record.origin(arguments.commit), "rows": results}
    record.write(kept, arguments, name="ring-cpu.json")


if __name__ == "__main__":
    main()
