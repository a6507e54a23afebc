"""The table of bench_step.py in README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def step_table(results: Path) -> str | None:
    """A training step of each draft algorithm; nothing before there is a record of them all."""
    for file in sorted(results.glob("step-*.json")):
        result = json.loads(file.read_text())
        if "drafts" in result:
            return _table(result)
    return None


def _table(result: dict[str, Any]) -> str:
    heads = (
        "draft", "parameters, millions", "forward and backward, ms", "the same in plain torch, ms",
        "with optimizer, ms", "samples/s", "useful TFLOP/s", "GiB",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, facts in result["drafts"].items():
        ways = {row["path"]: row for row in result["rows"] if row["draft"] == name}
        plain = ways["plain"]
        best = ways.get("kernels", plain)
        cells = (
            name, _cell(facts.get("parameters"), 1e-6, ",.0f"), _cell(best.get("step_s"), 1e3),
            _plain(plain), _cell(best.get("with_optimizer_s"), 1e3),
            _cell(best.get("samples_per_s"), 1, ".2f"), _cell(best.get("step_tflop_per_s"), 1),
            _cell(best.get("with_optimizer_peak_gib"), 1, ".1f"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + _note(result)


def _plain(row: dict[str, Any]) -> str:
    if "step" in row["skipped"] and "memory" in row["skipped"]["step"]:
        return "out of memory"
    return _cell(row.get("step_s"), 1e3)


def _cell(value: float | None, factor: float, form: str = ",.0f") -> str:
    return "-" if value is None else format(value * factor, form)


def _note(result: dict[str, Any]) -> str:
    documents = result["shape"]["documents"]
    host = result["machine"]
    return (
        f"\nbenchmarks/bench_step.py, {host['gpu'] or host['cpu']}, torch {host['torch']}, commit "
        f"{result['commit']}: a trainer alone, the target's shape that of Qwen3-8B, random "
        f"weights, default settings, {len(documents)} samples of {max(documents)} tokens in one "
        "micro-batch, every position supervised. With optimizer: FSDP2, clipping, AdamW; samples/s "
        "and GiB are those of it. Useful: the operations that must be done, nothing twice, where "
        "counted."
    )
