"""The table of bench_quality.py in README.md."""

from __future__ import annotations

import json
from pathlib import Path


def quality_table(results: Path) -> str | None:
    """Drafts trained from nothing on one GPU: real and simulated acceptance length, and speed."""
    files = sorted(results.glob("quality-*.json"))
    if not files:
        return None
    result = json.loads(files[0].read_text())
    heads = (
        "draft", "steps", "loss", "simulated", "real, greedy", "real, T = 1", "through SGLang",
        "tokens/s at 1, 8, 32", "without a draft",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, draft in result["drafts"].items():
        for kind, one in draft["reference"]["drafters"].items():
            if kind != "bigram table":
                trained = kind == "trained draft"
                cells = [str(draft["steps"] if trained else 0), *_cells(one)]
                cells += _served(draft["sglang"]) if trained else ["-"] * 3
                lines.append(f"| {name}{'' if trained else ', untrained'} | {' | '.join(cells)} |")
    first = next(iter(result["drafts"].values()))
    table = first["reference"]["drafters"]["bigram table"]
    lines.append(f"| bigram table | - | {' | '.join(_cells(table))} | - | - | - |")
    gaps = [
        _gap(one["reference"]["drafters"]["trained draft"]) for one in result["drafts"].values()
    ]
    target, reference, millions = result["target"], first["reference"], 1e6
    note = (
        f"\nbenchmarks/bench_quality.py, one {result['machine']['gpu']}, "
        f"{result['seconds'] / 60:.0f} minutes in all, commit {result['commit']}: a target of "
        f"{target['parameters'] / millions:.0f} million parameters, trained for "
        f"{target['train_s']:.0f} s on {target['tokens'] / millions:.0f} million tokens of the "
        f"machine's text; {result['samples']['tokens'] / millions:.0f} million tokens that it "
        f"wrote itself at T = 1; both drafts read {first['tokens'] / millions:.0f} million. "
        f"Acceptance length with the bonus token, {reference['num_prompts']} prompts of held-out "
        f"files; {reference['plain_looping_share']:.0%} of the greedy outputs loop. "
        f"Real, greedy, is {' and '.join(gaps)} off simulated."
    )
    return "\n".join(lines) + "\n" + note


def _cells(one: dict) -> list[str]:
    lengths = (one[key]["acceptance_length"] for key in ("simulated", "greedy", "sampled"))
    loss = "-" if one["loss"] is None else f"{one['loss']:.2f}"
    return [loss, *(f"{length:.2f}" for length in lengths)]


def _gap(one: dict) -> str:
    simulated = one["simulated"]["acceptance_length"]
    return f"{one['greedy']['acceptance_length'] / simulated - 1:+.1%}"


def _served(served: dict) -> list[str]:
    """Greedy acceptance length and tokens per second by batch size, with and without a draft."""
    if "skipped" in served:
        return ["-"] * 3
    raise NotImplementedError
