"""Engine alone, trainer alone, and both on the same GPUs, in one job with interleaved windows.

    python benchmarks/bench_colocate.py --gpus 2 --mps require --out FILE
    python benchmarks/bench_colocate.py --tiny                              # this machine's CPU

`make bench-gpu` runs the cell `qwen3_8b` on one GPU, with MPS and without.

Starts one torchrun of two ranks per GPU, which are those of a colocated run (see colocate_rank.py):
target with random weights, synthetic token ids, every position supervised. The cell `qwen3_8b` is
Qwen3-8B with Eagle3 (draft vocabulary of 32,000, 7 steps of training-time test) on four documents
of 2048 tokens per micro-batch; `original_2` and `original_8` are the workload of the system that
this one follows: the whole vocabulary, lengths with a mean of 850 tokens, 2 or 8 samples per step.
`dflash` is the first with DFlash (5 layers, 512 anchors, blocks of 16), `dflash_70` has 360 anchors
per sample, and `dflash_original_2` and `dflash_original_8` are the other two with it.

`sum of shares` is R_both (1 / R_engine + 1 / R_trainer) in samples per second, the median over the
windows: 1.0 means that colocation costs nothing, for two roles that wait for the same arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import flops
import numpy as np
import record
import torch
from workloads import CELLS, TINY_TARGET, Cell, loss_mask, settings, write_dataset

from colospec.batch import Cursor, TokenBatch
from colospec.config import RunConfig
from colospec.launch import visible_gpus
from colospec.mps.keeper import die_with
from colospec.target import Target
from colospec.train.job import load_target

SAMPLES_OF_THE_ORIGINAL = 40_000
ALWAYS = (
    "+mode=colocate", "target.weights=random", "trainer.max_steps=1000000000",
    "trainer.schedule=constant", "trainer.warmup_fraction=0", "limit.step_s=900",
)  # fmt: skip


def windows(num: int, *, raw: bool) -> list[str]:
    """Return the order of windows: one to warm up, then interleaved ones."""
    kinds = ["engine", "raw", "trainer", "both"] if raw else ["engine", "trainer", "both"]
    return ["both", *kinds * num]


def run_job(arguments: argparse.Namespace, directory: Path) -> tuple[RunConfig, list[Any]]:
    """Run the ranks to their end; return the settings and what each rank saw."""
    cell = CELLS[arguments.cell]
    overrides = [
        *ALWAYS, *cell.overrides(arguments.gpus), f"mps={arguments.mps}",
        f"engine={arguments.engine}", *arguments.overrides,
    ]  # fmt: skip
    if arguments.cell.startswith("tiny"):
        (directory / "tiny").mkdir()
        (directory / "tiny" / "config.json").write_text(json.dumps(TINY_TARGET))
        overrides.append(f"target.path={directory / 'tiny'}")
    run = settings(overrides)
    if run.draft.algorithm not in flops.FORMULAS:
        sys.exit(f"error: benchmarks/flops.py has no formula for draft={run.draft.algorithm}")
    target = load_target(run)
    lengths, mask = samples(cell)
    work_per_sample(run, target, lengths, mask)  # what cannot be counted is told before the run
    plan = {
        "overrides": overrides,
        "directory": str(directory),
        "dataset": str(write_dataset(directory, lengths, mask, target.vocab_size)),
        "windows": windows(arguments.windows, raw=arguments.raw),
        "seconds": arguments.seconds,
        "warm_s": min(arguments.seconds, 5.0),
        "started": time.time(),
    }
    (directory / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("colocate_rank.py")
    words = ["--standalone", f"--nproc-per-node={2 * arguments.gpus}", str(script)]
    command = [sys.executable, "-m", "torch.distributed.run", *words, str(directory / "plan.json")]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        subprocess.run(
            command, check=True, timeout=arguments.limit, env=env, preexec_fn=die_with(os.getpid())
        )
    except subprocess.SubprocessError as error:
        for file in sorted(directory.glob("run/log/*.log")):
            print(f"--- {file.name}", *file.read_text().splitlines()[-20:], sep="\n")
        sys.exit(f"error: {error}")
    ranks = sorted(directory.glob("rank*.json"))
    return run, [json.loads(file.read_text()) for file in ranks]


def by_kind(ranks: list[Any], role: str) -> dict[str, list[list[Any]]]:
    """Return kind of window -> its windows in order -> one entry for each rank of `role`."""
    kinds: dict[str, list[list[Any]]] = {}
    own = [rank["windows"] for rank in ranks if rank["role"] == role]
    for together in zip(*own, strict=True):
        kinds.setdefault(together[0]["window"], []).append(list(together))
    return kinds


def rate(ranks: list[Any], *, together: bool) -> float:
    """Return samples per second of one window: trainers count the samples of all of them."""
    rates = [one["num_samples"] / one["seconds"] for one in ranks]
    return rates[0] if together else sum(rates)


def mean_parts(window: list[list[Any]]) -> dict[str, float]:
    """Return the median over windows of the mean over ranks of each part, in seconds."""
    names = window[0][0]["parts"]
    return {
        name: statistics.median(statistics.fmean(r["parts"][name] for r in w) for w in window)
        for name in names
    }


def samples(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of the cell's samples, and which of their tokens are supervised."""
    rng = np.random.default_rng(0)
    lengths = cell.lengths(rng)
    return lengths, loss_mask(cell, lengths, rng)


def work_per_sample(
    run: RunConfig, target: Target, lengths: np.ndarray, mask: np.ndarray
) -> dict[str, float]:
    """Return floating-point operations and supervised positions of the mean sample."""
    sizes = lengths.tolist()
    masks = [torch.from_numpy(part) for part in np.split(mask, lengths.cumsum()[:-1])]
    ids = [torch.zeros(len(part), dtype=torch.int64) for part in masks]
    work = flops.step(
        run.draft, target, TokenBatch.pack(Cursor(0, 0, 0), range(len(ids)), ids, masks)
    )
    assert work is not None
    return {
        "tokens": float(lengths.mean()),
        "prefill_flop": flops.prefill(target, sizes) / len(sizes),
        "train_flop": work.flop / len(sizes),
        **{name: count / len(sizes) for name, count in work.counts.items()},
    }


def summarise(
    run: RunConfig, ranks: list[Any], lengths: np.ndarray, mask: np.ndarray, gpus: int
) -> dict[str, Any]:
    """Turn the windows of all ranks into the figures of the record."""
    engine, trainer = by_kind(ranks, "engine"), by_kind(ranks, "trainer")
    rates = {
        "engine": [rate(w, together=False) for w in engine["engine"]],
        "trainer": [rate(w, together=True) for w in trainer["trainer"]],
        "both": [rate(w, together=True) for w in trainer["both"]],
    }
    if "raw" in engine:
        rates["raw"] = [rate(w, together=False) for w in engine["raw"]]
    each = zip(rates["engine"], rates["trainer"], rates["both"], strict=True)
    shares = [b * (1 / e + 1 / t) for e, t, b in each]
    work = work_per_sample(run, load_target(run), lengths, mask)
    needs = {
        "engine": work["prefill_flop"], "raw": work["prefill_flop"],
        "trainer": work["train_flop"], "both": work["prefill_flop"] + work["train_flop"],
    }  # fmt: skip
    median = {kind: statistics.median(values) for kind, values in rates.items()}
    tflops = {kind: median[kind] * needs[kind] / gpus / 1e12 for kind in median}
    peak = flops.PEAK.get(record.machine()["gpu"] or "", 0.0) / 1e12
    last = trainer["both"][-1][0]
    used = [max(r["used_gib"] for r in w) for w in trainer["both"]]
    per_step = last["num_samples"] / last["num_steps"]
    engine_both = mean_parts(engine["both"])
    return {
        "samples_per_s": median,
        "tokens_per_s": {kind: value * work["tokens"] for kind, value in median.items()},
        "samples_per_s_windows": rates,
        "sum_of_shares": statistics.median(shares),
        "sum_of_shares_windows": shares,
        "engine_over_raw": statistics.median(
            [e / r for e, r in zip(rates["engine"], rates["raw"], strict=True)]
        )
        if "raw" in rates
        else None,
        "tflops_per_gpu": tflops,
        "mfu": {kind: value / peak for kind, value in tflops.items()} if peak else None,
        "gpu_hours_per_40000_samples": SAMPLES_OF_THE_ORIGINAL / median["both"] * gpus / 3600,
        "work_per_sample": work,
        "samples_per_step": per_step,
        "supervised_positions_per_step": work["supervised_positions"] * per_step,
        "kept_share": min(r["kept_share"] for r in ranks if r["role"] == "trainer"),
        "step_s": {
            "engine": engine_both["engine"], "transport": engine_both["transport"],
            **mean_parts(trainer["both"]),
        },
        "engine_waits_for_slot_s": engine_both["slot"],
        "step_s_alone": {
            "engine": mean_parts(engine["engine"])["engine"], **mean_parts(trainer["trainer"]),
        },
        "loss": [w[0]["metrics"]["loss"] for w in trainer["both"]],
        "skipped_share": max(w[0]["metrics"]["skipped"] for w in trainer["both"]),
        "steps": [w[0]["num_steps"] for w in trainer["both"]],
        "memory_gib": {
            "device_used": used,
            **{
                f"{role}_{what}": max(r[f"{what}_gib"] for r in ranks if r["role"] == role)
                for role in ("engine", "trainer")
                for what in ("reserved", "allocated")
            },
        },
        "first_step_s": max(r["first_step_s"] for r in ranks if r["role"] == "trainer"),
    }  # fmt: skip


def show(kept: dict[str, Any]) -> None:
    """Print the figures."""
    figures = kept["figures"]
    print(f"\n{kept['cell']}, {kept['gpus']} GPUs, mps={kept['mps']}, engine {kept['engine']}")
    print(f"{'':10}{'samples/s':>12}{'tokens/s':>12}{'TFLOP/s/GPU':>13}{'MFU':>8}")
    for kind, value in figures["samples_per_s"].items():
        mfu = f"{figures['mfu'][kind]:.1%}" if figures["mfu"] else "-"
        print(
            f"{kind:10}{value:12.2f}{figures['tokens_per_s'][kind]:12.0f}"
            f"{figures['tflops_per_gpu'][kind]:13.1f}{mfu:>8}"
        )
    split = "  ".join(f"{name} {1e3 * s:.1f}" for name, s in figures["step_s"].items())
    print(f"sum of shares {figures['sum_of_shares']:.3f}; ms per step: {split}")
    if figures["engine_over_raw"] is not None:
        print(f"engine alone / raw forward {figures['engine_over_raw']:.3f}")
    print(
        f"{figures['supervised_positions_per_step']:.0f} supervised positions per step, "
        f"{figures['kept_share']:.1%} with a loss; first step after {figures['first_step_s']:.1f} s"
        f"; {figures['gpu_hours_per_40000_samples']:.2f} GPU-hours per 40,000 samples"
    )
    memory = ", ".join(f"{used:.2f}" for used in figures["memory_gib"]["device_used"])
    print(f"GiB used of a device after each window: {memory}")


def parse() -> argparse.Namespace:
    parser = record.parser(__doc__, tiny="a tiny target on the CPU, in seconds")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--cell", choices=sorted(CELLS), default="qwen3_8b")
    parser.add_argument("--mps", choices=("require", "off"), default="require")
    parser.add_argument("--engine", choices=("auto", "hf", "sglang"), default="auto")
    parser.add_argument("--windows", type=int, default=5, help="of each kind")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each window")
    parser.add_argument("--limit", type=float, default=3000.0, help="seconds for the whole job")
    parser.add_argument("overrides", nargs="*", help="further settings, as ring.num_slots=4")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.cell = "tiny_dflash" if "dflash" in arguments.cell else "tiny"
        arguments.mps, arguments.engine = "off", "hf"
        arguments.seconds, arguments.windows = min(arguments.seconds, 1.0), 2
    # The transformers engine has no forward pass that writes nothing.
    arguments.raw = arguments.engine != "hf" and visible_gpus() > 0
    return arguments


def main() -> None:
    """Run one cell, print its figures, write its record."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="bench-colocate-") as name:
        run, ranks = run_job(arguments, Path(name))
        figures = summarise(run, ranks, *samples(CELLS[arguments.cell]), arguments.gpus)
    origin = record.origin(arguments.commit)
    kept = {
        "benchmark": "colocate",
        "cell": arguments.cell,
        "gpus": arguments.gpus,
        "mps": arguments.mps,
        "engine": arguments.engine,
        "windows": arguments.windows,
        "seconds": arguments.seconds,
        "machine": origin["machine"],
        "versions": record.versions(),
        "commit": origin["commit"],
        "command": origin["command"],
        "figures": figures,
    }
    show(kept)
    mps = "off" if arguments.mps == "off" else "mps"
    record.write(kept, arguments, name=f"colocate-{arguments.cell}-{arguments.gpus}-{mps}.json")


if __name__ == "__main__":
    main()
