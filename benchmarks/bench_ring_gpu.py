"""How features travel between two processes of one GPU: the ring against the usual ways.

    python benchmarks/bench_ring_gpu.py [--out FILE] [--commit TEXT]     also under an MPS daemon

A producer and a consumer process, all cases in one run. The producer writes what an engine writes,
three aux tensors side by side and the last hidden states (bfloat16, H = 4096), into the slot where
the transport allows it, else into memory of its own. Per transport and size, medians:

- host_us: host time of handing one complete payload over.
- stall_us: stream time of write and handover, beyond that of the same writes into private memory;
  the consumer only gives payloads back, so that no reading competes for memory. With host_us, this
  is what a payload costs the engine.
- acquire_us: host time until there is room for the next payload, in the same stream of payloads.
- latency_us: from the moment a payload is complete until the consumer holds it.
- gb_per_s: payload bytes over the time of a stream of payloads that the consumer sums, both sides
  at work; `copy` is a device-to-device copy in one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_mp
from bench_ring import MIB, RESULTS, commit, machine

from colospec.batch import Cursor, Features, FeatureSpec, TokenBatch
from colospec.ring.channel import Reader, Writer
from colospec.store import JobStore

SIZES_MIB = (1, 4, 16, 64, 160, 256, 512)
WIDTH = 4096
NUM_AUX = 3
BYTES_PER_TOKEN = (NUM_AUX + 1) * WIDTH * 2
DEVICE = torch.device("cuda:0")
SPEC = FeatureSpec(tuple(range(NUM_AUX)), True, WIDTH, torch.bfloat16)
WARM_UP = 10


class Transport(Protocol):
    """Both sides have one each."""

    def target(self) -> Features:
        """Return where the producer writes the next payload."""
        ...

    def send(self) -> None:
        """Hand over what was written."""
        ...

    def receive(self, use: Callable[[Features], None]) -> None:
        """Wait for a payload, use it, give it back."""
        ...

    def close(self) -> None: ...


class Ring:
    """This project's ring, views on both sides; the payload is the setting ring.payload."""

    def __init__(
        self, wiring: Wiring, name: str, rows: int, is_producer: bool, *, slots: int, payload: str
    ) -> None:
        store = JobStore(dist.FileStore(f"{wiring.directory}/ring", -1))
        side = Writer if is_producer else Reader
        self._end: Any = side(
            store, f"{name}-{rows}", SPEC, max_tokens=rows, max_sequences=1, num_slots=slots,
            plan_digest="bench", timeout_s=60.0, device=DEVICE, payload=payload,
        )  # fmt: skip
        ids, mask = torch.zeros(rows, dtype=torch.int64), torch.ones(rows).bool()
        self._tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [mask])
        _ = self._tokens.digest

    def target(self) -> Features:
        return self._end.acquire(self._tokens, timeout_s=60.0)  # type: ignore[no-any-return]

    def send(self) -> None:
        self._end.publish()

    def receive(self, use: Callable[[Features], None]) -> None:
        with self._end.acquire(timeout_s=60.0) as lease:
            use(lease.features)

    def close(self) -> None:
        if isinstance(self._end, Writer):
            self._end.end()
        self._end.close()


class ReduceTensor:
    """torch.multiprocessing: CUDA tensors exported anew for every payload, as the original did."""

    def __init__(self, wiring: Wiring, rows: int, _is_producer: bool) -> None:
        self._queue, self._acks = wiring.tensor_queue, wiring.ack_queue
        self._rows = rows
        self._sent: list[Features] = []

    def target(self) -> Features:
        self._work = private(self._rows)
        return self._work

    def send(self) -> None:
        # The consumer's stream does not wait for ours.
        torch.cuda.current_stream().synchronize()
        self._queue.put((self._work.aux_hidden_states, self._work.last_hidden_states))
        self._sent.append(self._work)
        if len(self._sent) > 2:
            self._acks.get(timeout=60)
            self._sent.pop(0)

    def receive(self, use: Callable[[Features], None]) -> None:
        use(Features(*self._queue.get(timeout=60)))
        torch.cuda.current_stream().synchronize()
        self._acks.put(1)

    def close(self) -> None:
        for _ in self._sent:
            self._acks.get(timeout=60)
        self._sent.clear()


class Gloo:
    """Through pinned host memory and a gloo group, on loopback TCP."""

    def __init__(self, _wiring: Wiring, rows: int, is_producer: bool) -> None:
        self._peer = int(is_producer)
        self._work = private(rows)
        self._staging = torch.empty(rows, BYTES_PER_TOKEN // 2, dtype=torch.bfloat16).pin_memory()

    def target(self) -> Features:
        return self._work

    def send(self) -> None:
        aux, last = self._work.aux_hidden_states, self._work.last_hidden_states
        self._staging.copy_(torch.cat([aux, last], dim=-1))
        dist.send(self._staging, self._peer)

    def receive(self, use: Callable[[Features], None]) -> None:
        dist.recv(self._staging, self._peer)
        both = self._staging.to(DEVICE)
        use(Features(both[:, : NUM_AUX * WIDTH], both[:, NUM_AUX * WIDTH :]))

    def close(self) -> None: ...


def _ring(slots: int, payload: str) -> Callable[[Wiring, int, bool], Transport]:
    name = f"{payload}-{slots}"
    return lambda wiring, rows, is_producer: Ring(
        wiring, name, rows, is_producer, slots=slots, payload=payload
    )


TRANSPORTS: dict[str, Callable[[Wiring, int, bool], Transport]] = {
    "ring, 1 slot": _ring(1, "ipc"),
    "ring, 2 slots": _ring(2, "ipc"),
    "ring, 3 slots": _ring(3, "ipc"),
    "ring, 3 host slots": _ring(3, "host"),
    "torch reduce_tensor": ReduceTensor,
    "gloo, pinned": Gloo,
}


class Wiring:
    """What the two processes share before a transport is made."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        context = torch_mp.get_context("spawn")
        self.tensor_queue: Any = context.Queue(3)
        self.ack_queue: Any = context.Queue()

    def join(self, rank: int) -> None:
        """Make this process rank 0 (producer) or 1 (consumer) of a gloo world."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(f"{self.directory}/gloo", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        torch.cuda.set_device(DEVICE)


def private(rows: int) -> Features:
    """Memory for one payload that only this process sees."""
    aux = torch.empty(rows, NUM_AUX * WIDTH, dtype=torch.bfloat16, device=DEVICE)
    return Features(aux, torch.empty(rows, WIDTH, dtype=torch.bfloat16, device=DEVICE))


def rows_of(size_mib: int) -> int:
    return size_mib * MIB // BYTES_PER_TOKEN


def counts(name: str) -> tuple[int, int]:
    """Payloads in flight one by one, and in a stream."""
    slow = name.startswith("gloo")
    return (4, 4) if slow else (30, 60)


def total(features: Features) -> None:
    """Read every byte of a payload."""
    assert features.last_hidden_states is not None
    features.aux_hidden_states.view(torch.int64).sum()
    features.last_hidden_states.view(torch.int64).sum()


def consume(wiring: Wiring, pipe: Connection) -> None:
    """Be the consumer: follow the order of cases in which the parent produces."""
    wiring.join(1)
    for name, make in TRANSPORTS.items():
        for size_mib in SIZES_MIB:
            transport = make(wiring, rows_of(size_mib), False)
            alone, stream = counts(name)
            for _ in range(WARM_UP + alone):
                transport.receive(lambda _: pipe.send(time.monotonic()))
            for _ in range(stream):
                transport.receive(lambda _: None)
            for _ in range(WARM_UP + stream):
                transport.receive(total)
            torch.cuda.synchronize()
            pipe.send(time.monotonic())
            transport.close()
    dist.destroy_process_group()


class Source:
    """What the producer writes, again and again."""

    def __init__(self, size_mib: int) -> None:
        shape = (rows_of(size_mib), WIDTH)
        self._parts = [
            torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(NUM_AUX + 1)
        ]

    def write(self, out: Features) -> None:
        """Fill `out` as an engine does."""
        *aux, last = self._parts
        torch.cat(aux, dim=-1, out=out.aux_hidden_states)
        assert out.last_hidden_states is not None
        out.last_hidden_states.copy_(last)


def stream_seconds(count: int, work: Callable[[], object]) -> float:
    """Return the stream's time per call of `work`."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / count


def produce(wiring: Wiring, pipe: Connection, name: str, size_mib: int) -> dict[str, Any]:
    """Measure one transport at one size."""
    source, scratch = Source(size_mib), private(rows_of(size_mib))
    transport = TRANSPORTS[name](wiring, rows_of(size_mib), True)
    alone, stream = counts(name)
    latencies, hosts, stalls, acquires = [], [], [], []
    for _ in range(WARM_UP + alone):
        source.write(transport.target())
        torch.cuda.synchronize()
        complete = time.monotonic()
        transport.send()
        hosts.append(time.monotonic() - complete)
        latencies.append(pipe.recv() - complete)
    events = []
    for _ in range(stream):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        asked = time.monotonic()
        out = transport.target()
        acquires.append(time.monotonic() - asked)
        marks[0].record()
        source.write(scratch)
        marks[1].record()
        source.write(out)
        transport.send()
        marks[2].record()
        events.append(marks)
    torch.cuda.synchronize()
    for first, middle, last in events:
        stalls.append(middle.elapsed_time(last) - first.elapsed_time(middle))
    for _ in range(WARM_UP):
        source.write(transport.target())
        transport.send()
    began = time.monotonic()
    for _ in range(stream):
        source.write(transport.target())
        transport.send()
    torch.cuda.synchronize()
    ended = pipe.recv()
    transport.close()
    nbytes = size_mib * MIB
    return {
        "transport": name,
        "size_mib": size_mib,
        "host_us": statistics.median(hosts[WARM_UP:]) * 1e6,
        "stall_us": statistics.median(stalls) * 1e3,
        "acquire_us": statistics.median(acquires) * 1e6,
        "latency_us": statistics.median(latencies[WARM_UP:]) * 1e6,
        "gb_per_s": stream * nbytes / (ended - began) / 1e9,
    }


def copy_rate(size_mib: int) -> dict[str, Any]:
    """Measure a plain device-to-device copy."""
    source = torch.randn(size_mib * MIB // 4, device=DEVICE)
    out = torch.empty_like(source)
    stream_seconds(5, lambda: out.copy_(source))
    seconds = stream_seconds(30, lambda: out.copy_(source))
    return {"transport": "copy", "size_mib": size_mib, "gb_per_s": size_mib * MIB / seconds / 1e9}


def show(row: dict[str, Any]) -> None:
    columns = [f"{row.get(key, float('nan')):11.2f}" for key in COLUMNS]
    print(f"{row['transport']:22}{row['size_mib']:5d}{''.join(columns)}", flush=True)


COLUMNS = ("host_us", "stall_us", "acquire_us", "latency_us", "gb_per_s")


def run_cases() -> list[dict[str, Any]]:
    """Run everything; print a line per case."""
    print(f"{'transport':22}{'MiB':>5}" + "".join(f"{key:>11}" for key in COLUMNS))
    context = mp.get_context("spawn")
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-ring-") as directory:
        wiring = Wiring(directory)
        here, there = context.Pipe()
        process = context.Process(target=consume, args=(wiring, there))
        process.start()
        there.close()
        try:
            wiring.join(0)
            for name in TRANSPORTS:
                for size_mib in SIZES_MIB:
                    results.append(produce(wiring, here, name, size_mib))
                    show(results[-1])
            for size_mib in SIZES_MIB:
                results.append(copy_rate(size_mib))
                show(results[-1])
            dist.destroy_process_group()
            process.join(20)
        finally:
            process.kill()
            process.join()
    return results


def main() -> None:
    """Run all cases and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=None, help="for a tree without .git")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_ring_gpu needs a CUDA GPU; bench_ring.py measures the CPU")
    host = machine()
    has_mps = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    slug = host["gpu"].lower().replace(" ", "-") + ("-mps" if has_mps else "")
    record = {
        "benchmark": "ring_gpu",
        "machine": host,
        "mps": has_mps,
        "commit": arguments.commit or commit(),
        "command": " ".join(["python", *sys.argv]),
        "rows": run_cases(),
    }
    out = arguments.out or RESULTS / f"ring-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
