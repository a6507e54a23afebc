"""Draw benchmarks/results/quality-*.json as an SVG beside each.

python benchmarks/quality_plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from record import RESULTS

BARS = ("simulated", "real, greedy", "real, T = 1")


def draw(record: dict[str, Any], image: Path) -> None:
    """Draw loss and first-token accuracy over steps, and acceptance lengths, of both drafts."""
    rcParams["svg.hashsalt"] = "colospec"  # the same figures give the same file
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, length = figure.subplots(1, 3)
    for name, draft in record["drafts"].items():
        steps = [row["step"] for row in draft["curve"]]
        first = draft["curve"][0]["loss"]
        loss.plot(steps, [row["loss"] / first for row in draft["curve"]], label=name)
        for place, style in ((0, "-"), (1, "--"), (2, ":")):
            shown = [row[f"acc_{place}"] for row in draft["curve"]]
            color = f"C{list(record['drafts']).index(name)}"
            accuracy.plot(steps, shown, style, color=color, label=f"{name}, token {place + 1}")
    loss.set_title("training loss, first report = 1")
    accuracy.set_title("training accuracy by drafted token")
    for axes in (loss, accuracy):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    if all("drafters" in draft["reference"] for draft in record["drafts"].values()):
        _bars(length, record)
    canvas = FigureCanvasSVG(figure)
    canvas.print_svg(str(image), metadata={"Date": None})


def _bars(axes: Any, record: dict[str, Any]) -> None:
    rows = []
    for name, draft in record["drafts"].items():
        drafters = draft["reference"]["drafters"]
        rows += [(f"{name}\n{kind.split()[0]}", drafters[kind]) for kind in list(drafters)[:2]]
    table = next(iter(record["drafts"].values()))["reference"]["drafters"]["bigram table"]
    rows.append(("bigram\ntable", table))
    width = 0.8 / len(BARS)
    for number, label in enumerate(BARS):
        places = [place + (number - 1) * width for place in range(len(rows))]
        axes.bar(places, [_lengths(one)[number] for _, one in rows], width, label=label)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows], fontsize="small")
    axes.set_ylim(bottom=1.0)
    axes.set_title("acceptance length, bonus token counted")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")


def _lengths(one: dict[str, Any]) -> tuple[float, float, float]:
    parts = (one["simulated"], one["greedy"], one["sampled"])
    first, second, third = (part["acceptance_length"] for part in parts)
    return first, second, third


def main() -> None:
    """Draw every record."""
    for file in sorted(RESULTS.glob("quality-*.json")):
        draw(json.loads(file.read_text()), file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
