"""Start whole jobs and read what they left."""

import json
import time
from pathlib import Path

from tests.torchrun import command, pids_of, run

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


def wait_for(path, text, process, timeout_s=60):
    """Wait until `text` is in the file `path`, which `process` writes."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.is_file() and text in path.read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError(f"{text!r} never came in {path}")


def rank_pid(process, rank):
    """The pid of a rank of the job, from its environment."""
    for pid in pids_of(process):
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environ and b"LOCAL_RANK" in b"".join(environ):
            return pid
    raise AssertionError(f"no rank {rank}")
