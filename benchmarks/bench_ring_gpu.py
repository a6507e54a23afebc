"""How features travel between two processes of one GPU: the ring against the usual ways.

    python benchmarks/bench_ring_gpu.py [--out FILE]                     also under an MPS daemon

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

import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as torch_mp
from ring_parts import MIB, Ring, Transport, Wiring, consumer, hand_over, one_by_one

from colospec.batch import Features, FeatureSpec
from colospec.ring.channel import Payload

SIZES_MIB = (1, 4, 16, 64, 160, 256, 512)
WIDTH = 4096
NUM_AUX = 3
BYTES_PER_TOKEN = (NUM_AUX + 1) * WIDTH * 2
DEVICE = torch.device("cuda:0")
SPEC = FeatureSpec(tuple(range(NUM_AUX)), True, WIDTH, torch.bfloat16)
WARM_UP = 10


class Queues(Wiring):
    """Queues beside the ring."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        context = torch_mp.get_context("spawn")
        self.tensors: Any = context.Queue(3)
        self.acks: Any = context.Queue()


class ReduceTensor:
    """torch.multiprocessing: CUDA tensors exported anew for every payload, as the original did."""

    def __init__(self, wiring: Queues, rows: int, _is_producer: bool) -> None:
        self._queue, self._acks = wiring.tensors, wiring.acks
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

    def receive(self, use: Callable[[Features], object]) -> None:
        use(Features(*self._queue.get(timeout=60)))
        torch.cuda.current_stream().synchronize()
        self._acks.put(1)

    def close(self) -> None:
        for _ in self._sent:
            self._acks.get(timeout=60)
        self._sent.clear()


class Gloo:
    """Through pinned host memory and a gloo group, on loopback TCP."""

    def __init__(self, _wiring: Queues, rows: int, is_producer: bool) -> None:
        self._peer = int(is_producer)
        self._work = private(rows)
        self._staging = torch.empty(rows, BYTES_PER_TOKEN // 2, dtype=torch.bfloat16).pin_memory()

    def target(self) -> Features:
        return self._work

    def send(self) -> None:
        aux, last = self._work.aux_hidden_states, self._work.last_hidden_states
        self._staging.copy_(torch.cat([aux, last], dim=-1))
        dist.send(self._staging, self._peer)

    def receive(self, use: Callable[[Features], object]) -> None:
        dist.recv(self._staging, self._peer)
        both = self._staging.to(DEVICE)
        use(Features(both[:, : NUM_AUX * WIDTH], both[:, NUM_AUX * WIDTH :]))

    def close(self) -> None: ...


def _ring(slots: int, payload: Payload) -> Callable[[Queues, int, bool], Transport]:
    return lambda wiring, rows, is_producer: Ring(
        wiring, SPEC, rows, is_producer, slots=slots, device=DEVICE, payload=payload
    )


TRANSPORTS: dict[str, Callable[[Queues, int, bool], Transport]] = {
    "ring, 1 slot": _ring(1, "ipc"),
    "ring, 2 slots": _ring(2, "ipc"),
    "ring, 3 slots": _ring(3, "ipc"),
    "ring, 3 host slots": _ring(3, "host"),
    "torch reduce_tensor": ReduceTensor,
    "gloo, pinned": Gloo,
}


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


def consume(wiring: Queues, pipe: Connection) -> None:
    """Be the consumer: follow the order of cases in which the parent produces."""
    wiring.join(1)
    torch.cuda.set_device(DEVICE)
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


def produce(wiring: Queues, pipe: Connection, name: str, size_mib: int) -> dict[str, Any]:
    """Measure one transport at one size."""
    source, scratch = Source(size_mib), private(rows_of(size_mib))
    transport = TRANSPORTS[name](wiring, rows_of(size_mib), True)
    alone, stream = counts(name)
    stalls, acquires = [], []

    def send_one() -> tuple[float, float]:
        return hand_over(transport, source.write, torch.cuda.synchronize)

    latencies, hosts = one_by_one(WARM_UP + alone, send_one, pipe)
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
    results = []
    with consumer(Queues, consume) as (wiring, pipe):
        torch.cuda.set_device(DEVICE)
        for name in TRANSPORTS:
            for size_mib in SIZES_MIB:
                results.append(produce(wiring, pipe, name, size_mib))
                show(results[-1])
        for size_mib in SIZES_MIB:
            results.append(copy_rate(size_mib))
            show(results[-1])
    return results


def main() -> None:
    """Run all cases and write the JSON."""
    arguments = record.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: bench_ring_gpu.py needs a CUDA GPU; bench_ring.py measures the CPU")
    origin = record.origin(arguments.commit)
    has_mps = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    kept = {
        "benchmark": "ring_gpu",
        "machine": origin["machine"],
        "mps": has_mps,
        "commit": origin["commit"],
        "command": origin["command"],
        "rows": run_cases(),
    }
    suffix = "-mps" if has_mps else ""
    record.write(kept, arguments, name=f"ring-{record.slug(origin['machine'])}{suffix}.json")


if __name__ == "__main__":
    main()
