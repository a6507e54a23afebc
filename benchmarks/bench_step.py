"""One training step of each draft algorithm: with the Triton kernels and without.

    python benchmarks/bench_step.py                          # one GPU, within four minutes
    python benchmarks/bench_step.py --draft eagle3 draft.loss=lk_alpha draft.draft_vocab_size=null
    python benchmarks/bench_step.py --tiny                   # this machine's CPU

Every algorithm with its default settings and random weights, in the shape of Qwen3-8B, on four
documents of 2048 tokens, all of them supervised. The target's favourite token is always one that
the draft can say. Per algorithm and path:

- step: forward and backward of the draft in bfloat16, with the same random choices every time.
- with optimizer: the same through FSDP2 with float32 master weights, gradient clipping and fused
  AdamW, as in the trainer; samples per second are those of this.
- loss, attention, layer: of Eagle3 alone, forward and backward of that part of all TTT steps.
- TFLOP/s counts the matrix products that must be done, nothing twice, where flops.py has a formula.

On a GPU the plain path is measured once, and skipped where memory does not suffice; on a CPU there
is no other. Each algorithm runs in a process of its own with its share of --limit, and what one
loses the others keep. A run of all of them as they are is kept in benchmarks/results, any other one
only where --out says. The README's table is drawn from the former.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import sys
import time
from typing import Any

import record
import torch
from step_case import LENGTHS, TINY_LENGTHS, make_target
from step_draft import NO_TIME, Plan, Row, empty_rows, measure_draft, paths

from colospec.draft import catalog

PARTS = ("step", "loss", "attention", "layer", "with_optimizer")
SHOWN_KERNELS = 5
MORE = 1.5
"""An algorithm may take so many times its share of the time that is left."""
LAST_STEP_S = 8.0
"""Of an algorithm's share of the time: for what has begun when nothing new may."""


def run_draft(arguments: argparse.Namespace, name: str, limit_s: float) -> tuple[Row, list[Row]]:
    """Measure one algorithm in a process; return its facts, and a row for each path."""
    begin = time.monotonic()
    deadline = begin + max(limit_s / 2, limit_s - LAST_STEP_S)
    plan = Plan(name, tuple(arguments.overrides), arguments.tiny, arguments.repeats, deadline)
    context = mp.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure_draft, args=(plan, there), daemon=True)
    process.start()
    there.close()
    facts: Row = {}
    rows = empty_rows(name, paths())
    ended = False
    while not ended and (left := begin + limit_s - time.monotonic()) > 0 and here.poll(left):
        try:
            kind, found = here.recv()
        except (EOFError, OSError):
            ended = True
            continue
        if kind == "facts":
            facts = found
        else:
            rows[found["path"]] = found
    process.join(5.0 if ended else 0.0)
    reason = f"its process ended with exit code {process.exitcode}"
    if process.exitcode is None:
        reason = f"its process had not ended after {limit_s:.1f} s"
        process.kill()
        process.join()
    if process.exitcode != 0:
        for row in rows.values():
            row["failed"]["process"] = reason
    return {**facts, "seconds": round(time.monotonic() - begin, 1)}, list(rows.values())


def run_all(arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
    """Measure one after another within the limit, adding to `kept` and printing."""
    print(f"{'draft':10}{'path':9}{'part':16}{'ms':>10}{'TFLOP':>10}{'TFLOP/s':>10}")
    end = time.monotonic() + arguments.limit
    for number, name in enumerate(arguments.names):
        left, others = end - time.monotonic(), len(arguments.names) - number - 1
        if left > 0:
            facts, rows = run_draft(arguments, name, min(left, MORE * left / (others + 1)))
        else:
            facts, rows = {}, list(empty_rows(name, paths()).values())
            rows[0]["skipped"]["step"] = NO_TIME
        kept["drafts"][name] = facts
        kept["rows"] += rows
        show(facts, rows)


def show(facts: Row, rows: list[Row]) -> None:
    """Print what was measured of one algorithm."""
    for row in rows:
        head = f"{row['draft']:10}{row['path']:9}"
        for part in PARTS:
            if (took := row.get(f"{part}_s")) is None:
                continue
            tera = facts.get("tera_flops", {}).get(part)
            useful = "" if tera is None else f"{tera:10.2f}{tera / took:10.0f}"
            print(f"{head}{part.replace('_', ' '):16}{took * 1e3:10.1f}{useful}")
        if "samples_per_s" in row:
            print(f"{head}{row['samples_per_s']:.2f} samples/s")
        for key, what in (("peak_gib", "step"), ("with_optimizer_peak_gib", "with optimizer")):
            if row.get(key) is not None:
                print(f"{head}peak {row[key]:.1f} GiB, {what}")
        if "loss" in row:
            print(f"{head}loss {row['loss']:.4f}")
        for outcome in ("skipped", "failed"):
            for what, reason in row[outcome].items():
                print(f"{head}{outcome}: {what}: {reason}")
        for kernel in row.get("kernels", [])[:SHOWN_KERNELS]:
            print(f"{head}{kernel['ms']:8.2f} ms {kernel['calls']:6} x {kernel['name']}")
    if "moved_gib" in facts:
        print(
            f"{rows[0]['draft']:19}moved at least {facts['moved_gib']:.1f} GiB by elementwise work"
        )
    sys.stdout.flush()


def shape(*, tiny: bool) -> dict[str, Any]:
    """Return the sizes of target and micro-batch."""
    target = make_target(tiny=tiny)
    return {
        "hidden": target.hidden_size,
        "intermediate": target.intermediate_size,
        "heads": target.num_attention_heads,
        "kv_heads": target.num_key_value_heads,
        "head_dim": target.head_dim,
        "vocabulary": target.vocab_size,
        "documents": list(TINY_LENGTHS if tiny else LENGTHS),
    }


def parse() -> argparse.Namespace:
    known = list(catalog.algorithms())
    parser = record.parser(__doc__, tiny="tiny sizes, on a CPU too")
    parser.add_argument("--draft", metavar="NAME,...", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--repeats", type=int, default=10, help="most steps of a series")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for everything")
    parser.add_argument("overrides", nargs="*", help="further settings, as draft.num_layers=3")
    arguments = parser.parse_args()
    arguments.names = arguments.draft.split(",") if arguments.draft else known
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"--draft {','.join(unknown)} is unknown; choose of {', '.join(known)}")
    if not (arguments.tiny or torch.cuda.is_available()):
        sys.exit("error: bench_step.py needs a CUDA GPU; try --tiny on a CPU")
    return arguments


def main() -> None:
    """Measure the algorithms one after another, print the figures, write the JSON."""
    arguments = parse()
    origin = record.origin(arguments.commit)
    kept: dict[str, Any] = {
        "benchmark": "step",
        "machine": origin["machine"],
        "versions": record.versions(),
        "commit": origin["commit"],
        "command": origin["command"],
        "shape": shape(tiny=arguments.tiny),
        "drafts": {},
        "rows": [],
    }
    is_whole = False
    try:
        run_all(arguments, kept)
        is_whole = not (arguments.draft or arguments.overrides) and all(
            not row["failed"] and NO_TIME not in row["skipped"].values() for row in kept["rows"]
        )
    finally:
        file = f"step-{record.slug(origin['machine'])}.json" if is_whole else None
        record.write(kept, arguments, name=file)
    if failed := dict.fromkeys(row["draft"] for row in kept["rows"] if row["failed"]):
        sys.exit(f"error: not all of {', '.join(failed)} could be measured; see above")


if __name__ == "__main__":
    main()
