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
        "draft", "steps", "loss", "simulated", "real, greedy", "real, T = 1",
        "through SGLang (loop)", f"tokens/s at {_batch_sizes(result)}", "without a draft",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, draft in result["drafts"].items():
        measured = draft["reference"].get("drafters", {})
        for kind in ("trained draft", "untrained draft"):
            trained = kind == "trained draft"
            cells = [str(draft["steps"] if trained else 0), *_cells(measured.get(kind))]
            cells += _served(draft["sglang"]) if trained else ["-"] * 3
            lines.append(f"| {name}{'' if trained else ', untrained'} | {' | '.join(cells)} |")
    first = next(iter(result["drafts"].values()))
    table = first["reference"].get("drafters", {}).get("bigram table")
    lines.append(f"| bigram table | - | {' | '.join(_cells(table))} | - | - | - |")
    return "\n".join(lines) + "\n" + _note(result)


def _note(result: dict) -> str:
    target, samples = result["target"], result["samples"]
    first = next(iter(result["drafts"].values()))
    sizes = [part / 1e6 for part in (target["parameters"], target["tokens"], samples["tokens"])]
    return (
        f"\nbenchmarks/bench_quality.py, one {result['machine']['gpu']}, "
        f"{result['seconds'] / 60:.0f} minutes in all, commit {result['commit']}: a target of "
        f"{sizes[0]:.0f} million parameters, trained for {target['train_s']:.0f} s on "
        f"{sizes[1]:.0f} million tokens of the machine's text; {sizes[2]:.0f} million tokens that "
        f"it wrote itself at T = {samples['temperature']:g}; both drafts read "
        f"{first['tokens'] / 1e6:.0f} million. {_measured(result['drafts'])}SGLang decodes "
        "greedily, some of the prompts; in brackets our loop on the same, in bfloat16."
    )


def _measured(drafts: dict[str, dict]) -> str:
    """What the reference loop measured; nothing where it failed."""
    references = [draft["reference"] for draft in drafts.values()]
    if any("skipped" in one for one in references):
        return ""
    first = references[0]
    gaps = " and ".join(_gap(one["drafters"]["trained draft"]) for one in references)
    return (
        f"Acceptance length with the bonus token, {first['num_prompts']} prompts of held-out "
        f"files; {first['plain_looping_share']:.0%} of the greedy outputs loop. Real, greedy, is "
        f"{gaps} off simulated. "
    )


def _batch_sizes(result: dict) -> str:
    for draft in result["drafts"].values():
        if "skipped" not in draft["sglang"]:
            return ", ".join(str(run["batch_size"]) for run in _runs(draft["sglang"]))
    return "-"


def _runs(served: dict) -> list[dict]:
    return [run for run in served["through_sglang"]["runs"] if run["temperature"] == 0]


def _cells(one: dict | None) -> list[str]:
    if one is None:
        return ["-"] * 4
    lengths = (one[key]["acceptance_length"] for key in ("simulated", "greedy", "sampled"))
    loss = "-" if one["loss"] is None else f"{one['loss']:.2f}"
    return [loss, *(f"{length:.2f}" for length in lengths)]


def _gap(one: dict) -> str:
    simulated = one["simulated"]["acceptance_length"]
    return f"{one['greedy']['acceptance_length'] / simulated - 1:+.1%}"


def _served(served: dict) -> list[str]:
    """What SGLang gave: greedy acceptance length (and that of the loop on the same prompts), then
    tokens per second by batch size, with the draft and without."""
    if "skipped" in served:
        return ["-"] * 3
    runs = _runs(served)
    loop = served["greedy"]["acceptance_length"]
    rates = (
        " / ".join(f"{run[key]:,.0f}" for run in runs)
        for key in ("tokens_per_s", "plain_tokens_per_s")
    )
    return [f"{runs[0]['acceptance_length']:.2f} ({loop:.2f})", *rates]
