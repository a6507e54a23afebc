"""How features travel between two processes: the ring against the usual ways, in one run.

    python benchmarks/bench_ring.py [--out FILE]

A producer and a consumer process on one host; the consumer sums every payload, in place where the
transport allows it. Per transport and size:

- latency_ms: from the moment the features are complete in the producer until the consumer has
  summed them, one payload in flight (CLOCK_MONOTONIC in both processes).
- stall_ms: how long the producer stands still to hand a complete payload over. The ring's producer
  writes features into the slot to begin with, the others into memory of their own.
- gb_per_s: payload bytes over the time of a stream of payloads, with production and sum.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_mp
from torch import Tensor

from colospec.batch import Cursor, FeatureSpec, TokenBatch
from colospec.ring.channel import Reader, Writer
from colospec.store import JobStore

MIB = 1 << 20
SIZES_MIB = (1, 4, 16, 64, 256)
WIDTH = 4096
NUM_SLOTS = 3
RESULTS = Path(__file__).parent / "results"


class Transport(Protocol):
    """Both sides have one each. The producer calls target and send, the consumer receive."""

    def target(self) -> Tensor:
        """Return where the next payload is to be produced."""
        ...

    def send(self) -> None:
        """Hand over what was produced into `target`."""
        ...

    def receive(self, use: Callable[[Tensor], None]) -> None:
        """Wait for a payload and use it."""
        ...

    def close(self) -> None: ...


class Ring:
    """This project's ring, views on both sides."""

    def __init__(self, wiring: Wiring, num_rows: int, is_producer: bool) -> None:
        spec = FeatureSpec((0,), last_hidden_states=False, hidden_size=WIDTH, dtype=torch.float32)
        store = JobStore(dist.FileStore(f"{wiring.directory}/ring", -1))
        side = Writer if is_producer else Reader
        self._end: Any = side(
            store, str(num_rows), spec, max_tokens=num_rows, max_sequences=1,
            num_slots=NUM_SLOTS, plan_digest="bench", timeout_s=60.0,
        )  # fmt: skip
        ids, mask = torch.zeros(num_rows, dtype=torch.int64), torch.ones(num_rows).bool()
        self._tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [mask])

    def target(self) -> Tensor:
        views = self._end.acquire(self._tokens, timeout_s=60.0)
        return views.aux_hidden_states

    def send(self) -> None:
        self._end.publish()

    def receive(self, use: Callable[[Tensor], None]) -> None:
        with self._end.acquire(timeout_s=60.0) as lease:
            use(lease.features.aux_hidden_states)

    def close(self) -> None:
        if isinstance(self._end, Writer):
            self._end.end()
        self._end.close()


class PickleQueue:
    """multiprocessing.Queue: the payload's bytes through a pickle and a pipe."""

    def __init__(self, wiring: Wiring, num_rows: int, is_producer: bool) -> None:
        self._queue = wiring.pickle_queue
        self._work = torch.empty(num_rows if is_producer else 0, WIDTH)

    def target(self) -> Tensor:
        return self._work

    def send(self) -> None:
        self._queue.put(self._work.numpy().tobytes())

    def receive(self, use: Callable[[Tensor], None]) -> None:
        use(torch.frombuffer(bytearray(self._queue.get(timeout=60)), dtype=torch.float32))

    def close(self) -> None: ...


class SharedTensorQueue:
    """torch.multiprocessing.Queue: a new shared-memory tensor for every payload."""

    def __init__(self, wiring: Wiring, num_rows: int, is_producer: bool) -> None:
        self._queue = wiring.tensor_queue
        self._shape = (num_rows if is_producer else 0, WIDTH)

    def target(self) -> Tensor:
        self._work = torch.empty(self._shape).share_memory_()
        return self._work

    def send(self) -> None:
        self._queue.put(self._work)

    def receive(self, use: Callable[[Tensor], None]) -> None:
        use(self._queue.get(timeout=60))

    def close(self) -> None: ...


class Gloo:
    """torch.distributed send and receive over loopback TCP."""

    def __init__(self, _wiring: Wiring, num_rows: int, is_producer: bool) -> None:
        self._peer = int(is_producer)
        self._work = torch.empty(num_rows, WIDTH)

    def target(self) -> Tensor:
        return self._work

    def send(self) -> None:
        dist.send(self._work, self._peer)

    def receive(self, use: Callable[[Tensor], None]) -> None:
        dist.recv(self._work, self._peer)
        use(self._work)

    def close(self) -> None: ...


TRANSPORTS: dict[str, Callable[[Wiring, int, bool], Transport]] = {
    "ring": Ring,
    "multiprocessing.Queue": PickleQueue,
    "torch shared tensor queue": SharedTensorQueue,
    "gloo send/recv": Gloo,
}


class Wiring:
    """What the two processes share before a transport is made."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.pickle_queue: Any = mp.get_context("spawn").Queue(NUM_SLOTS)
        self.tensor_queue: Any = torch_mp.get_context("spawn").Queue(NUM_SLOTS)

    def join(self, rank: int) -> None:
        """Make this process rank 0 (producer) or 1 (consumer) of a gloo world."""
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(f"{self.directory}/gloo", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)


def counts(size_mib: int) -> tuple[int, int]:
    """Payloads for latency and for throughput."""
    return max(4, min(100, 200 // size_mib)), max(4, min(100, 800 // size_mib))


def consume(wiring: Wiring, pipe: Connection) -> None:
    """Be the consumer: follow the order of cases in which the parent produces."""
    wiring.join(1)
    for make in TRANSPORTS.values():
        for size_mib in SIZES_MIB:
            transport = make(wiring, rows(size_mib), False)
            num_latency, num_stream = counts(size_mib)
            for _ in range(NUM_SLOTS + num_latency + num_stream):
                transport.receive(lambda payload: float(payload.sum()))
                pipe.send(time.monotonic())
            transport.close()
    dist.destroy_process_group()


def produce(wiring: Wiring, pipe: Connection, name: str, size_mib: int) -> dict[str, Any]:
    """Measure one transport at one size."""
    source = torch.rand(rows(size_mib), WIDTH)
    transport = TRANSPORTS[name](wiring, rows(size_mib), True)
    latencies, stalls = [], []

    def send_one() -> float:
        transport.target().copy_(source)
        complete = time.monotonic()
        transport.send()
        stalls.append(time.monotonic() - complete)
        return complete

    num_latency, num_stream = counts(size_mib)
    for _ in range(NUM_SLOTS + num_latency):
        complete = send_one()
        latencies.append(pipe.recv() - complete)
    # The first payloads touch fresh memory on both sides.
    del latencies[:NUM_SLOTS]
    stalls.clear()
    began = time.monotonic()
    for _ in range(num_stream):
        send_one()
    ended = [pipe.recv() for _ in range(num_stream)][-1]
    transport.close()
    latencies.sort()
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


@contextmanager
def consumer() -> Iterator[tuple[Wiring, Connection]]:
    """Run the consumer process; gives the producer's ends."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-ring-") as directory:
        wiring = Wiring(directory)
        here, there = context.Pipe()
        process = context.Process(target=consume, args=(wiring, there))
        process.start()
        there.close()
        try:
            wiring.join(0)
            yield wiring, here
            process.join(20)
        finally:
            process.kill()
            process.join()


def machine() -> dict[str, Any]:
    """Describe this host."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """Return the checked-out commit, marked if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    """Run all cases, print the table, write the JSON."""
    host = machine()
    slug = (host["gpu"] or "cpu").lower().replace(" ", "-")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / f"ring-{slug}.json")
    arguments = parser.parse_args()
    print(f"{'transport':27}{'MiB':>5}{'GB/s':>8}{'latency ms':>12}{'p99':>9}{'stall ms':>10}")
    results = []
    with consumer() as (wiring, pipe):
        for name in TRANSPORTS:
            for size_mib in SIZES_MIB:
                row = produce(wiring, pipe, name, size_mib)
                results.append(row)
                print(
                    f"{name:27}{size_mib:5d}{row['gb_per_s']:8.2f}{row['latency_ms']:12.3f}"
                    f"{row['latency_p99_ms']:9.3f}{row['stall_ms']:10.3f}",
                    flush=True,
                )
        dist.destroy_process_group()
    record = {
        "benchmark": "ring",
        "machine": host,
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "rows": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
