"""Draw the tables of README.md from the JSON files in benchmarks/results, and from nothing else.

python benchmarks/tables.py               redraw README.md
python benchmarks/tables.py RUN_DIR       first keep the report of a demo run as a result
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from quality_table import quality_table
from record import RESULTS, machine
from step_table import step_table

ROOT = Path(__file__).parent.parent


def demo_table(results: Path) -> str:
    """Real and simulated acceptance length of the demo's drafters."""
    lines = [
        "| draft | drafter | simulated | real, greedy | real, sampled at T = 1 "
        "| target forwards saved |",
        "|---|---|---|---|---|---|",
    ]
    # The table of bigrams depends on the target alone, and is shown once.
    files = sorted(results.glob("demo-*-cpu.json"))
    for file in files:
        result = json.loads(file.read_text())
        algorithm = file.name.split("-")[1]
        for name, one in result["drafters"].items():
            if name == "bigram table" and file is not files[-1]:
                continue
            greedy, sampled = one["greedy"], one["sampled"]
            lines.append(
                f"| {algorithm if name != 'bigram table' else '-'} | {name} "
                f"| {one['simulated']['acceptance_length']:.2f} "
                f"| {greedy['acceptance_length']:.2f} | {sampled['acceptance_length']:.2f} "
                f"| {greedy['target_forwards_saved']:.0%} |"
            )
    loops = result["plain_looping_share"]
    note = (
        f"\n`make demo` and `make demo draft=dflash`, {_machine(result)}: acceptance length with "
        f"the bonus token, {result['num_prompts']} held-out prompts, {loops:.0%} of the target's "
        "outputs loop."
    )
    return "\n".join(lines) + "\n" + note


def ring_table(results: Path) -> str:
    """The ring beside three other transports, at three sizes."""
    result = json.loads((results / "ring-cpu.json").read_text())
    lines = [
        "| transport | MiB | GB/s | one-way latency, ms | producer's stall per publish, ms |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["size_mib"] in (1, 16, 256):
            lines.append(
                f"| {row['transport']} | {row['size_mib']} | {row['gb_per_s']:.2f} "
                f"| {row['latency_ms']:.2f} | {row['stall_ms']:.3f} |"
            )
    note = f"\n`make bench`, {_machine(result)}: between two processes, all in one run."
    return "\n".join(lines) + "\n" + note


def ring_gpu_table(results: Path) -> str | None:
    """The ring in GPU memory beside other transports, at one size."""
    files = sorted(results.glob("ring-*-mps.json"))
    if not files:
        return None
    result = json.loads(files[0].read_text())
    lines = [
        "| transport, 160 MiB | host time, us | stream time, us | wait for room, us "
        "| one-way latency, us | GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["size_mib"] == 160:
            keys = ("host_us", "stall_us", "acquire_us", "latency_us")
            cells = [f"{row[key]:,.1f}" if key in row else "-" for key in keys]
            cells.append(f"{row['gb_per_s']:,.0f}")
            lines.append(f"| {row['transport']} | {' | '.join(cells)} |")
    note = (
        f"\n`make bench-gpu`, two processes on one {result['machine']['gpu']} under MPS, commit "
        f"{result['commit']}: host and stream time of handing over one payload, beyond writing it "
        "into private memory; `copy` is a device-to-device copy in one process."
    )
    return "\n".join(lines) + "\n" + note


def colocate_table(results: Path) -> str | None:
    """Engine alone, trainer alone and both, by GPUs and with or without MPS."""
    found = _colocated(results, "qwen3_8b")
    if not found:
        return None
    lines = [
        "| GPUs | share by | engine alone | trainer alone | both | sum of shares | MFU | tokens/s "
        "| GiB used | first step, s | windows |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        figures = one["figures"]
        rates = figures["samples_per_s"]
        mfu = figures["mfu"]
        lines.append(
            f"| {one['gpus']} | {_mps(one)} | {rates['engine']:.2f} | {rates['trainer']:.2f} "
            f"| {rates['both']:.2f} | {figures['sum_of_shares']:.3f} "
            f"| {format(mfu['both'], '.1%') if mfu else '-'} "
            f"| {figures['tokens_per_s']['both']:,.0f} "
            f"| {max(figures['memory_gib']['device_used']):.1f} | {figures['first_step_s']:.0f} "
            f"| {one['windows']} x {one['seconds']:g} s |"
        )
    first = found[0]
    note = (
        "\nSamples of 2048 tokens per second, Qwen3-8B (random weights) with Eagle3, 32,000 draft "
        "tokens, 7 steps of training-time test, every position supervised; medians of interleaved "
        f"windows; {first['machine']['gpu']}, SGLang {first['versions']['sglang']}, torch "
        f"{first['versions']['torch']}, {_commits(found)}. Sum of shares: both x (1 / engine"
        " + 1 / trainer); MFU counts useful operations against 989 TFLOP/s."
    )
    return "\n".join(lines) + "\n" + note


def split_table(results: Path) -> str | None:
    """Where the time of a step goes, alone and together."""
    found = _colocated(results, "qwen3_8b")
    if not found:
        return None
    parts = ("engine", "transport", "wait", "forward", "backward", "optimizer")
    heads = (f"{'publish (host)' if part == 'transport' else part}, ms" for part in parts)
    lines = [
        f"| GPUs | share by | roles | {' | '.join(heads)} |",
        "|---" * (3 + len(parts)) + "|",
    ]
    for one in found:
        for roles, key in (("both", "step_s"), ("each alone", "step_s_alone")):
            split = one["figures"][key]
            shown = (f"{1e3 * split[part]:.1f}" if part in split else "-" for part in parts)
            lines.append(f"| {one['gpus']} | {_mps(one)} | {roles} | {' | '.join(shown)} |")
    return "\n".join(lines)


def original_table(results: Path) -> str | None:
    """The original system's own workload."""
    found = _colocated(results, "original_2") + _colocated(results, "original_8")
    if not found:
        return None
    lines = [
        "| GPUs | share by | samples per step | samples/s | GPU-hours per 40,000 samples "
        "| windows |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        figures = one["figures"]
        lines.append(
            f"| {one['gpus']} | {_mps(one)} | {figures['samples_per_step']:.1f} "
            f"| {figures['samples_per_s']['both']:.2f} "
            f"| {figures['gpu_hours_per_40000_samples']:.2f} "
            f"| {one['windows']} x {one['seconds']:g} s |"
        )
    note = (
        "\nQwen3-8B with Eagle3 over the whole vocabulary, lengths with a mean of 850 tokens. The "
        "original colocated system took 1.68 GPU-hours on two H100s (13.25 samples/s) for a whole "
        "run; ours: H200s, random weights, every position supervised, training alone, without "
        "start and export."
    )
    return "\n".join(lines) + "\n" + note


def dflash_table(results: Path) -> str | None:
    """DFlash: the same as `colocate_table`, and the original system's workload."""
    names = {
        "dflash": "2048 tokens, 512 anchors",
        "dflash_70": "2048 tokens, 360 anchors",
        "dflash_original_2": "the original's, 2 samples per step",
        "dflash_original_8": "the original's, 8 samples per step",
    }
    found = [(name, one) for name in names for one in _colocated(results, name)]
    if not found:
        return None
    lines = [
        "| samples | GPUs | share by | engine alone | trainer alone | both | sum of shares | MFU "
        "| trainer, GiB | GPU-hours per 40,000 samples | windows |",
        "|---" * 11 + "|",
    ]
    for name, one in found:
        figures = one["figures"]
        rates, mfu = figures["samples_per_s"], figures["mfu"]
        lines.append(
            f"| {names[name]} | {one['gpus']} | {_mps(one)} | {rates['engine']:.2f} "
            f"| {rates['trainer']:.2f} | {rates['both']:.2f} | {figures['sum_of_shares']:.3f} "
            f"| {format(mfu['both'], '.1%') if mfu else '-'} "
            f"| {figures['memory_gib']['trainer_reserved']:.1f} "
            f"| {figures['gpu_hours_per_40000_samples']:.2f} "
            f"| {one['windows']} x {one['seconds']:g} s |"
        )
    first = found[0][1]
    note = (
        "\nSamples per second, Qwen3-8B (random weights) with DFlash: 5 layers, blocks of 16, up "
        "to 512 anchors per sample, all samples of a step in one micro-batch (draft.max_blocks); "
        f"{first['machine']['gpu']}, SGLang "
        f"{first['versions']['sglang']}, torch {first['versions']['torch']}, "
        f"{_commits([one for _, one in found])}. The original colocated system: 7.51 "
        "samples/s and 2.96 GPU-hours on two H100s."
    )
    return "\n".join(lines) + "\n" + note


def _colocated(results: Path, cell: str) -> list[dict]:
    """Return the records of bench_colocate.py for a cell, by GPUs, MPS first."""
    records = [json.loads(file.read_text()) for file in results.glob("colocate-*.json")]
    return sorted(
        (one for one in records if one["cell"] == cell),
        key=lambda one: (one["gpus"], one["mps"] == "off"),
    )


def _commits(records: list[dict]) -> str:
    return f"commit {', '.join(dict.fromkeys(one['commit'] for one in records))}"


def _mps(record: dict) -> str:
    return "time slicing" if record["mps"] == "off" else "MPS"


TABLES: dict[str, Callable[[Path], str | None]] = {
    "demo": demo_table,
    "ring": ring_table,
    "ring_gpu": ring_gpu_table,
    "colocate": colocate_table,
    "split": split_table,
    "original": original_table,
    "dflash": dflash_table,
    "step": step_table,
    "quality": quality_table,
}


def draw(text: str, results: Path = RESULTS) -> str:
    """Return `text` with every table that has results, between its marks, drawn anew."""
    for name, table in TABLES.items():
        lines = table(results)
        if lines is None:
            continue
        begin, end = f"<!-- table {name} -->", "<!-- end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        drawn = f"{begin}\n{lines}\n{end}"
        text, count = re.subn(pattern, lambda _, drawn=drawn: drawn, text, count=1, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md has no place for the table {name!r}: {begin} ... {end}")
    return text


def keep_demo(run_dir: Path) -> None:
    """Copy a demo's report into the results, with where it comes from."""
    run = json.loads((run_dir / "run.json").read_text())
    algorithm = run["config"]["draft"]["algorithm"]
    git = run["git"] or {"sha": "unknown", "dirty": True}
    report = {
        "benchmark": "demo",
        "machine": machine() | {"gpu": None, "python": run["python"]},
        "commit": git["sha"][:7] + ("-dirty" if git["dirty"] else ""),
        "command": f"make demo draft={algorithm}",
        **json.loads((run_dir / "report.json").read_text()),
    }
    (RESULTS / f"demo-{algorithm}-cpu.json").write_text(json.dumps(report, indent=1) + "\n")


def _machine(result: dict) -> str:
    machine = result["machine"]
    return f"{machine['cores']} cores of {machine['cpu']}, commit {result['commit']}"


def main() -> None:
    if len(sys.argv) > 1:
        keep_demo(Path(sys.argv[1]))
    readme = ROOT / "README.md"
    readme.write_text(draw(readme.read_text()))


if __name__ == "__main__":
    main()
