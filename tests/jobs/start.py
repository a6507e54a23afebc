"""Start whole jobs and read what they left."""

import json
from pathlib import Path

from tests.torchrun import command, run

TIMEOUT_S = 150


def job(num_ranks, *words, timeout_s=TIMEOUT_S, expect=0, **options):
    """Run torchrun -m colospec.run WORDS to its end; return its output."""
    code, output, _ = run(command(num_ranks, "-m", "colospec.run", *words), timeout_s, **options)
    assert code == expect or (expect == "error" and code != 0), output[-6000:]
    return output


def losses(run_dir, name="train/loss"):
    """Every logged value of `name`, by step, as the exact floats that were written."""
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def files(directory):
    """Names below a directory that are there, for messages and for leftovers."""
    return sorted(str(p.relative_to(directory)) for p in Path(directory).rglob("*") if p.is_file())
