"""Run the demo:

python -m colospec.demo                       # target, data, training, report
python -m colospec.demo --report RUN_DIR      # the report of a finished run
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

import torch

from colospec.config import CONF_DIR
from colospec.demo.target import ensure_target
from colospec.demo.text import ensure_data, ensure_written
from colospec.evaluate.report import ReportSettings, find_export, report_run
from colospec.log import console, to_console
from colospec.target import Target

# Not __name__, which is __main__ here.
log = logging.getLogger("colospec.demo")


def main(arguments: list[str] | None = None) -> None:
    """Run the whole demo, or report on a run that was made before."""
    parser = argparse.ArgumentParser(
        prog="python -m colospec.demo", description="Make a target, train a draft, compare."
    )
    parser.add_argument("--report", type=Path, metavar="RUN_DIR", help="only report on this run")
    parser.add_argument("overrides", nargs="*", help="settings of colospec.run, as trainer.lr=1e-3")
    options = parser.parse_args(arguments)
    to_console()
    try:
        if options.report is not None:
            find_export(options.report)  # before minutes of work
        ensure_target()
        report(options.report or _train_draft(options.overrides))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def report(run_dir: Path) -> None:
    """Evaluate the draft of a run on the demo target; print the table and where it is kept."""
    data, target = ensure_data(), Target.load(ensure_target())
    log.info("decoding held-out prompts with the trained draft, an untrained one, and a table")
    # Threads would only wait for each other in so small a model.
    torch.set_num_threads(1)
    result = report_run(
        run_dir,
        target,
        train_path=ensure_written(),
        eval_path=data.eval_path,
        settings=ReportSettings(),
    )
    console.print(result.comparison.table())
    console.print(
        "With so small a target drafting can cost more time than it saves; with a large one the "
        "saved forward passes decide."
    )
    for file in (result.report, result.curves, run_dir / "export"):
        if file is not None:
            console.print(f"wrote {file}")


def _experiment(overrides: list[str]) -> str:
    """Return the demo's settings for the chosen draft: demo_<draft>, or demo for the default."""
    given = [item.partition("=")[2] for item in overrides if item.startswith("draft=")]
    own = f"demo_{given[-1]}" if given else "demo"
    return own if (CONF_DIR / "experiment" / f"{own}.yaml").is_file() else "demo"


def _train_draft(overrides: list[str]) -> Path:
    """Train a draft in a job of its own; return the run directory."""
    given = [item.partition("=")[2] for item in overrides if item.startswith("run_dir=")]
    run_dir = Path(given[-1] if given else time.strftime("outputs/demo-%Y-%m-%d-%H-%M-%S"))
    choices = [
        "+mode=colocate",
        f"+experiment={_experiment(overrides)}",
        f"data.path={ensure_written()}",
        f"run_dir={run_dir}",
        *overrides,
    ]
    with subprocess.Popen([sys.executable, "-m", "colospec.run", *choices]) as training:
        try:
            code = training.wait()
        except KeyboardInterrupt:
            training.wait()  # it got the same Ctrl-C, and saves
            raise
    if code:
        raise RuntimeError(f"training ended with exit code {code}; see above")
    return run_dir


if __name__ == "__main__":
    main()
