"""Draw what training logged: metrics.jsonl in, one PNG out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ACCURACY = "train/acc_"


def draw_curves(metrics: Path, image: Path, *, real: dict[str, float] | None = None) -> None:
    """Draw loss, accuracy by drafted place and simulated acceptance length over optimizer steps;
    where there were evaluations and probes, held-out loss and real acceptance length too.

    `metrics` has one JSON object per line, with `step` and metrics by name. `real` names real
    acceptance lengths, which become horizontal lines. Raises ValueError where nothing was logged.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
    rows = [row for row in lines if "train/loss" in row]
    if not rows:
        raise ValueError(f"{metrics} has no line with train/loss; train for more steps")
    # Not pyplot, which keeps state and may want a display.
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, length = figure.subplots(1, 3)
    _line(loss, rows, "train/loss", label="training")
    _line(loss, lines, "eval/loss", label="held out")
    loss.set_title("loss")
    names = sorted({name for row in rows for name in row if name.startswith(ACCURACY)}, key=_step)
    for name in names:
        _line(accuracy, rows, name, label=f"token {_step(name) + 1}")
    accuracy.set_title("accuracy by drafted token")
    _line(length, rows, "train/simulated_acceptance_length", label="simulated (training)")
    _line(length, lines, "probe/real_acceptance_length", label="real (probes)")
    for number, (name, value) in enumerate((real or {}).items()):
        length.axhline(value, color=f"C{number + 2}", linestyle="--", label=f"real: {name}")
    length.set_title("acceptance length, bonus token counted")
    for axes in (loss, accuracy, length):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(image))


def _step(name: str) -> int:
    return int(name.removeprefix(ACCURACY))


def _line(axes: Any, rows: Sequence[dict[str, float]], name: str, label: str | None = None) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if not points:
        return
    axes.plot([step for step, _ in points], [value for _, value in points], label=label)
