"""`dry_run=true`: what a run would do, without loading a model or touching a GPU."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from colospec import demo
from colospec.config import Mode, RunConfig
from colospec.data.dataset import Dataset
from colospec.draft import registry
from colospec.log import console
from colospec.target import Target
from colospec.topology import Topology
from colospec.train.job import Job, load_target, sizes

GIB = 2**30


def show(run: RunConfig, topology: Topology) -> None:
    """Print rank table, memory budget and steps."""
    console.print(_rank_table(topology))
    for note in topology.notes:
        console.print(note)
    target = _target(run)
    console.print(_memory_table(run, topology, target))
    console.print(_steps(run, topology))


def _target(run: RunConfig) -> Target:
    if run.target.path is None and not demo.is_built():
        path = demo.target_directory()
        return Target.from_config(path, demo.target_config(), dtype=run.target.dtype.value)
    return load_target(run)


def _rank_table(topology: Topology) -> Table:
    table = Table(title=f"mode={topology.mode.value}: {len(topology.places)} ranks")
    for name in ("rank", "node", "role", "device", "role rank", "engine replica", "tp", "peer"):
        table.add_column(name, justify="right")
    for place in topology.places:
        table.add_row(
            str(place.rank),
            str(place.node),
            place.role.value,
            place.device,
            f"{place.role_rank}/{place.role_size}",
            str(place.replica),
            f"{place.tp_rank}/{place.tp_size}",
            "-" if place.peer is None else str(place.peer),
        )
    return table


def _memory_table(run: RunConfig, topology: Topology, target: Target) -> Table:
    """Budget one pair. Activations are not known without a run and not listed."""
    spec = registry.features(run.draft, target)
    num_slots = run.ring.num_slots if topology.mode is Mode.colocate else 1
    slots = num_slots * run.data.token_budget * spec.bytes_per_token
    num_trained = registry.find(run.draft.algorithm).public.num_parameters(run.draft, target)
    num_frozen = (1 if target.tied else 2) * target.vocab_size * target.hidden_size
    trainers = topology.num_trainers
    parts = [
        ("engine", "target weights", _target_bytes(target) / run.engine.tp),
        ("engine", f"ring: {num_slots} slots x {run.data.token_budget} tokens", slots),
        ("trainer", f"draft: {num_trained / 1e6:.1f} M parameters, fp32 + gradient + Adam",
         16 * num_trained / trainers),
        ("trainer", "gathered draft", 4 * num_trained),
        ("trainer", "target embedding and head, frozen", num_frozen * target.dtype.itemsize),
    ]  # fmt: skip
    table = Table(title="memory of one pair (GiB), activations and KV scratch not counted")
    table.add_column("role")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for role, what, size in parts:
        table.add_row(role, what, f"{size / GIB:.3f}")
    for role in ("engine", "trainer"):
        total = sum(size for name, _, size in parts if name == role)
        fraction = getattr(run.memory, f"{role}_fraction")
        limit = f"limit memory.{role}_fraction={fraction:g} of the GPU"
        table.add_row(role, f"total; {limit}", f"{total / GIB:.3f}", style="bold")
    return table


def _target_bytes(target: Target) -> float:
    """Size of the weights on disk, or by the shapes in config.json where there are none."""
    if on_disk := sum(file.stat().st_size for file in target.path.glob("*.safetensors")):
        return float(on_disk)
    width = target.hidden_size
    heads = target.num_attention_heads + target.num_key_value_heads
    layer = 2 * heads * target.head_dim * width + 3 * target.intermediate_size * width
    vocab = (1 if target.tied else 2) * target.vocab_size * width
    return float((target.num_layers * layer + vocab) * target.dtype.itemsize)


def _steps(run: RunConfig, topology: Topology) -> str:
    if run.target.path is None and not demo.is_built():
        return "steps: known once the demo target is built (by the first run)"
    job = Job.load(run, num_trainers=topology.num_trainers, progress=True)
    data: Dataset = job.dataset
    is_full = np.array_equal(sizes(run, data), data.lengths)
    limits = "" if is_full else f" (by {', '.join(run.draft.sized_by)})"
    filtered = ", ".join(f"{count} {reason}" for reason, count in data.num_filtered.items())
    return (
        f"steps: {job.total_steps} of {topology.num_trainers} trainers x "
        f"{run.trainer.accumulation} micro-batches of up to {run.data.token_budget} tokens; "
        f"{len(data)} samples ({filtered or 'none'} filtered out), "
        f"fill rate {job.plan.fill_rate():.1%}{limits}, features {job.spec.bytes_per_token} bytes "
        f"per token in {str(job.spec.dtype).removeprefix('torch.')}{_evaluations(job)}"
    )


def _evaluations(job: Job) -> str:
    """Say what is held out, and when it is evaluated."""
    trainer, held_out = job.run.trainer, job.held_out
    if held_out is None:
        return "; nothing held out"
    parts = [f"{len(held_out.sample_ids)} samples held out"]
    if trainer.eval_interval:
        parts.append(
            f"evaluated every {trainer.eval_interval} steps in {len(held_out.bins)} micro-batches"
        )
    if trainer.probe_interval:
        parts.append(
            f"real acceptance length every {trainer.probe_interval} steps on "
            f"{trainer.probe_prompts} prompts x {trainer.probe_tokens} tokens"
        )
    return f"\n{', '.join(parts)}"
