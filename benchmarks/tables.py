"""Draw the tables of README.md from the JSON files in benchmarks/results, and from nothing else.

python benchmarks/tables.py               redraw README.md
python benchmarks/tables.py RUN_DIR       first keep the report of a demo run as a result
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(results: Path) -> str:
    """Real and simulated acceptance length of the demo's drafters."""
    result = json.loads((results / "demo-cpu.json").read_text())
    lines = [
        "| drafter | simulated | real, greedy | real, sampled at T = 1 | target forwards saved |",
        "|---|---|---|---|---|",
    ]
    for name, one in result["drafters"].items():
        greedy, sampled = one["greedy"], one["sampled"]
        lines.append(
            f"| {name} | {one['simulated']['acceptance_length']:.2f} "
            f"| {greedy['acceptance_length']:.2f} | {sampled['acceptance_length']:.2f} "
            f"| {greedy['target_forwards_saved']:.0%} |"
        )
    loops = result["plain_looping_share"]
    note = (
        f"\n`make demo`, {_machine(result)}: acceptance length with the bonus token, "
        f"{result['num_prompts']} held-out prompts, {loops:.0%} of the target's outputs loop."
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


TABLES = {"demo": demo_table, "ring": ring_table}


def draw(text: str, results: Path = RESULTS) -> str:
    """Return `text` with every table between its marks drawn anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table {name} -->", "<!-- end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        drawn = f"{begin}\n{table(results)}\n{end}"
        text, count = re.subn(pattern, lambda _, drawn=drawn: drawn, text, count=1, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md has no place for the table {name!r}: {begin} ... {end}")
    return text


def keep_demo(run_dir: Path) -> None:
    """Copy a demo's report into the results, with where it comes from."""
    run = json.loads((run_dir / "run.json").read_text())
    git = run["git"] or {"sha": "unknown", "dirty": True}
    report = {
        "benchmark": "demo",
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": None,
            "torch": torch.__version__,
            "python": run["python"],
        },
        "commit": git["sha"][:7] + ("-dirty" if git["dirty"] else ""),
        "command": "make demo",
        **json.loads((run_dir / "report.json").read_text()),
    }
    (RESULTS / "demo-cpu.json").write_text(json.dumps(report, indent=1) + "\n")


def _machine(result: dict) -> str:
    machine = result["machine"]
    return f"{machine['cores']} cores of {machine['cpu']}, commit {result['commit']}"


def _cpu() -> str:
    lscpu = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Model name:\s*(.+)", lscpu)
    return found[1] if found else "unknown"


def main() -> None:
    if len(sys.argv) > 1:
        keep_demo(Path(sys.argv[1]))
    readme = ROOT / "README.md"
    readme.write_text(draw(readme.read_text()))


if __name__ == "__main__":
    main()
