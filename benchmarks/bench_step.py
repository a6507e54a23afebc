"""One training step of the Eagle3 draft: whole and in parts, with the Triton kernels and without.

    python benchmarks/bench_step.py [--tiny] [--out FILE]

Random weights in the shape of Qwen3-8B, four documents of 2048 tokens, all of them supervised. The
target's favourite token is always one that the draft can say, so every row has a loss. Per path:

- step: forward and backward of the draft in bfloat16.
- with optimizer: the same through FSDP2 with float32 master weights, gradient clipping and fused
  AdamW.
- loss, attention, layer: forward and backward of that part alone, of all TTT steps. TFLOP/s counts
  the matrix products that the part must do, nothing twice.
- moved: GiB that a step must at least move besides its matrix products.

A table of the slowest device kernels of one step follows. On a CPU both paths are the plain one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import RESULTS, commit, machine
from torch import Tensor

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.config import Dtype
from colospec.draft.alignment import Unroll, unroll
from colospec.draft.attention import Documents, ttt_attention
from colospec.draft.base import StepContext
from colospec.draft.eagle3.config import Eagle3Config, Loss
from colospec.draft.eagle3.model import Eagle3
from colospec.draft.kernels import choice
from colospec.draft.loss import LossSettings, Teacher, fused_loss
from colospec.target import Target
from colospec.train.fsdp import compute_dtype, shard

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """Sizes of target, draft and micro-batch; `head_dim` * `heads` is `hidden`."""

    hidden: int = 4096
    intermediate: int = 12_288
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151_936
    draft_vocabulary: int = 32_000
    ttt_length: int = 7
    documents: tuple[int, ...] = (2048,) * 4

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        out = self.heads * self.head_dim * self.hidden
        return attention + out + 3 * self.hidden * self.intermediate


TINY = Shape(64, 96, 4, 2, 16, 512, 128, 3, (20, 1, 33))


class Bench:
    """A draft with random weights, and one micro-batch on its device."""

    def __init__(self, shape: Shape, kind: Loss, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        self.dtype = compute_dtype(Dtype.auto, device)
        target = Target.from_config(Path("/random"), self._config())
        self.config = Eagle3Config(
            ttt_length=shape.ttt_length, draft_vocab_size=shape.draft_vocabulary, loss=kind
        )
        self.draft = Eagle3.from_config(
            self.config, target, token_counts=torch.rand(shape.vocabulary)
        ).to(device)
        matrix = (shape.vocabulary, shape.hidden)
        embedding, head = (
            torch.randn(matrix, device=device, dtype=self.dtype) * 0.02 for _ in range(2)
        )
        self.draft.set_target(embedding, head)
        ids = [torch.randint(0, shape.vocabulary, (n,)) for n in shape.documents]
        tokens = TokenBatch.pack(
            Cursor(0, 0, 0), range(len(ids)), ids, [torch.ones(len(part)).bool() for part in ids]
        )
        known = self.draft.target_ids
        favourites = torch.randint(0, shape.draft_vocabulary, (shape.tokens,), device=device)
        last = head[favourites if known is None else known[favourites]]
        # Long enough for the favourite to win by far, as in a trained target.
        last = last * 12 + self.normal(shape.tokens, shape.hidden) * 0.1
        aux = self.normal(shape.tokens, 3 * shape.hidden)
        self.batch = FeatureBatch(tokens, Features(aux, last.to(self.dtype)))
        self.rows: Unroll = unroll(
            tokens, ttt_length=shape.ttt_length, alignment=self.config.alignment
        ).to(device)
        borders = tokens.cu_seqlens
        self.documents = Documents(tuple(borders.tolist()), borders.to(device))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.normal(*shape).requires_grad_()

    def step(self) -> None:
        self.draft.zero_grad(set_to_none=True)
        self.draft(self.batch, StepContext(0, 1, self.shape.tokens)).loss.backward()

    def loss(self) -> Callable[[], None]:
        """The vocabulary head and loss alone."""
        config, settings = self.config, self.shape
        hidden = self.leaf(len(self.rows.positions), settings.hidden)
        weight = self.draft.lm_head.weight.detach().requires_grad_()
        last = self.batch.features.last_hidden_states
        assert last is not None
        teacher = Teacher(last, self.draft.frozen_head, self.draft.target_ids)
        weights = tuple(config.step_weight_decay**k for k in range(config.ttt_length))
        options = LossSettings(config.loss, config.lk_eta, weights, config.chunk_tokens)

        def run() -> None:
            sums = fused_loss(hidden, weight, teacher=teacher, rows=self.rows, settings=options)
            torch.autograd.grad(sums.loss, (hidden, weight))

        return run

    def attention(self) -> Callable[[], None]:
        """Attention of all steps, each with its own inputs."""
        s = self.shape
        query = self.leaf(s.tokens, s.heads, s.head_dim)
        keys, values = (
            [self.leaf(s.tokens, s.kv_heads, s.head_dim) for _ in range(s.ttt_length)]
            for _ in range(2)
        )

        def run() -> None:
            for step in range(1, s.ttt_length + 1):
                inputs = (keys[:step], values[:step])
                out = ttt_attention(query, *inputs, self.documents)
                torch.autograd.grad(out, (query, *inputs[0], *inputs[1]), torch.ones_like(out))

        return run

    def layer(self) -> Callable[[], None]:
        """The layer without its attention, `ttt_length` times."""
        s, layer = self.shape, self.draft.midlayer
        embeds, hidden = self.normal(s.tokens, s.hidden), self.leaf(s.tokens, s.hidden)
        table = self.draft.rope.table(self.rows.position_ids)
        group = s.heads // s.kv_heads

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Uses all three, so that all have gradients.
            pair = (key + value).unsqueeze(2).expand(-1, -1, group, -1)
            return query + pair.reshape(query.shape)

        def run() -> None:
            for _ in range(s.ttt_length):
                out = layer(embeds, hidden, table, attend)
                torch.autograd.grad(out, (hidden, *layer.parameters()), torch.ones_like(out))

        return run

    def tera_flops(self) -> dict[str, float]:
        """Matrix products of the parts in TFLOP; `step` adds the projection of the aux states."""
        s, rows = self.shape, self.rows
        supervised, steps = len(rows.positions), s.ttt_length
        heads = 6 * supervised * s.hidden * s.draft_vocabulary
        loss = heads + 2 * len(rows.teacher_rows) * s.hidden * s.vocabulary
        # Causal: half of the square. Two products forward, five backward.
        square = sum(n * n for n in s.documents)
        attention = 7 * square * s.heads * s.head_dim * steps
        layer = 6 * s.layer_parameters * s.tokens * steps
        fc = 4 * 3 * s.hidden * s.hidden * s.tokens
        parts = {"loss": loss, "attention": attention, "layer": layer}
        return {n: f / 1e12 for n, f in {**parts, "step": sum(parts.values()) + fc}.items()}

    def moved_gib(self) -> float:
        """Bytes that elementwise work must move in a step, every operand once per pass: logits
        (draft and teacher read, gradient written; the target's read), MLP (3 and 6 tensors), norms,
        rotation and residuals (about 30 tensors of hidden size)."""
        s, size = self.shape, torch.empty((), dtype=self.dtype).element_size()
        logits = 3 * len(self.rows.positions) * s.draft_vocabulary
        logits += len(self.rows.teacher_rows) * s.vocabulary
        layer = s.tokens * s.ttt_length * (9 * s.intermediate + 30 * s.hidden)
        return (logits + layer) * size / GIB

    def _config(self) -> dict[str, Any]:
        s = self.shape
        return {
            "hidden_size": s.hidden, "num_hidden_layers": 36, "vocab_size": s.vocabulary,
            "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads,
            "head_dim": s.head_dim, "intermediate_size": s.intermediate, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 40_960, "rope_theta": 1e6, "tie_word_embeddings": False,
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


@contextmanager
def path(name: str) -> Iterator[None]:
    """Choose the kernels where they exist, or force the plain path."""
    original = choice.fused
    if name == "plain":
        choice.fused = lambda _: False
    try:
        yield
    finally:
        choice.fused = original


def seconds(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Time of `run`, `repeats` of them at once as in training, after two to warm up: the median of
    three such series. The device is waited for around a series and never inside."""
    times = []
    for count in (2, repeats, repeats, repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronize(device)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(run: Callable[[], None], device: torch.device) -> float | None:
    """Peak of allocated memory over one call, weights included."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / GIB


def slowest(run: Callable[[], None], device: torch.device, count: int = 25) -> list[dict[str, Any]]:
    """Device kernels of one call by their total time."""
    if device.type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize(device)
    kernels = [
        {"name": event.key[:90], "calls": event.count, "ms": event.self_device_time_total / 1e3}
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(kernels, key=lambda kernel: -kernel["ms"])[:count]


def optimizer_step(bench: Bench) -> Callable[[], None]:
    """Shard the draft (for good) and return forward, backward, clipping and update."""
    for parameter in bench.draft.parameters():
        parameter.data = parameter.data.float()
    shard(bench.draft, world_size=1, dtype=bench.dtype)
    parameters = list(bench.draft.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run() -> None:
        bench.step()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()

    return run


def measure(bench: Bench, name: str, repeats: int) -> dict[str, Any]:
    """All of one path, except the optimizer."""
    device, flops = bench.device, bench.tera_flops()
    row: dict[str, Any] = {"path": name}
    with path(name):
        for part, run in {
            "step": bench.step,
            "loss": bench.loss(),
            "attention": bench.attention(),
            "layer": bench.layer(),
        }.items():
            took = seconds(run, device, repeats)
            row[f"{part}_s"], row[f"{part}_tflop_per_s"] = took, flops[part] / took
        row["peak_gib"] = peak_gib(bench.step, device)
        row["kernels"] = slowest(bench.step, device)
    return row


def with_optimizer(bench: Bench, rows: list[dict[str, Any]], repeats: int) -> None:
    """Add the time of a whole optimizer step to the row of each path."""
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    run = optimizer_step(bench)
    for row in rows:
        with path(row["path"]):
            row["with_optimizer_s"] = seconds(run, bench.device, repeats)
    dist.destroy_process_group()


def print_row(row: dict[str, Any], flops: dict[str, float]) -> None:
    for part, tera in flops.items():
        took = row[f"{part}_s"]
        print(f"{row['path']:9}{part:16}{took * 1e3:10.1f}{tera:10.2f}{tera / took:10.0f}")
    took = row["with_optimizer_s"]
    print(f"{row['path']:9}{'with optimizer':16}{took * 1e3:10.1f}")
    if row["peak_gib"] is not None:
        print(f"{row['path']:9}peak {row['peak_gib']:.1f} GiB")


def main() -> None:
    """Measure both paths, print the tables, write the JSON."""
    torch.set_num_threads(1)  # as under torchrun
    host = machine()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--full-vocabulary", action="store_true", help="no pruned vocabulary")
    parser.add_argument("--loss", type=Loss, default=Loss.kl, choices=list(Loss))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    slug = (host["gpu"] or "cpu").lower().replace(" ", "-")
    device = torch.device("cuda" if host["gpu"] else "cpu")
    shape = TINY if arguments.tiny else Shape()
    if arguments.full_vocabulary:
        shape = Shape(**{**vars(shape), "draft_vocabulary": shape.vocabulary})
    bench = Bench(shape, arguments.loss, device)
    bench.draft.to(bench.dtype)
    paths = ("kernels", "plain") if device.type == "cuda" else ("plain",)
    rows = [measure(bench, name, arguments.repeats) for name in paths]
    with_optimizer(bench, rows, arguments.repeats)

    flops = bench.tera_flops()
    print(f"{'path':9}{'part':16}{'ms':>10}{'TFLOP':>10}{'TFLOP/s':>10}")
    for row in rows:
        print_row(row, flops)
    print(f"moved at least {bench.moved_gib():.1f} GiB by elementwise work")
    for kernel in rows[0]["kernels"]:
        print(f"{kernel['ms']:10.2f} ms {kernel['calls']:6} x {kernel['name']}")
    record = {
        "benchmark": "step",
        "machine": host,
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "shape": vars(shape),
        "loss": arguments.loss.value,
        "tera_flops": flops,
        "moved_gib": bench.moved_gib(),
        "rows": rows,
    }
    out = arguments.out or RESULTS / f"step-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
