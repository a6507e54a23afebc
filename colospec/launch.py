"""Start one fresh torchrun for one job, wait for it, and return what it achieved.

Fresh processes for every job of a sweep: process groups, CUDA contexts and engines cannot be
reused safely. Nothing here touches CUDA.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from colospec.config import Mode, RunConfig
from colospec.mps.keeper import die_with
from colospec.signals import STOP_SIGNALS


class JobFailed(RuntimeError):
    """The torchrun job ended with an error."""


def visible_gpus() -> int:
    """Count the GPUs without creating a CUDA context."""
    import torch

    return torch.cuda.device_count()


def ranks_per_node(run: RunConfig) -> int:
    """Return how many ranks `launch.gpus` means: 2 per GPU in colocate mode, else 1."""
    gpus = run.launch.gpus
    if gpus != "auto":
        count = int(gpus)
    elif run.topology.gpus is not None:
        count = len(run.topology.gpus)
    else:
        count = max(visible_gpus(), 1)
    return count * (2 if run.mode is Mode.colocate else 1)


def command(run: RunConfig, overrides: Sequence[str], run_dir: Path) -> list[str]:
    """Return the torchrun command that does the same as this launcher, fit for typing."""
    launch = run.launch
    rendezvous = ["--standalone"]
    if launch.nodes > 1:
        rendezvous = [
            f"--nnodes={launch.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={launch.rdzv_endpoint}",
            f"--rdzv-id={run_dir.name}",
        ]
    restarts = [f"--max-restarts={launch.max_restarts}"] if launch.max_restarts else []
    ours = [word for word in overrides if not word.startswith("run_dir=")]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        *restarts,
        f"--nproc-per-node={ranks_per_node(run)}",
        "-m",
        "colospec.run",
        *ours,
        f"run_dir={run_dir}",
    ]


def launch(run: RunConfig, overrides: Sequence[str], run_dir: Path) -> float:
    """Run the job; return the objective from `run_dir`/result.json (lower is better).

    Raises JobFailed with the exit code and where the logs are. Ctrl-C and SIGTERM are passed on
    and the job is waited for, so that no rank is orphaned, and SystemExit ends a sweep as well; if
    this process is killed, torchrun ends too.
    """
    words = command(run, overrides, run_dir)
    shown = ["torchrun", *words[3:]]
    print(f"launch: {shlex.join(shown)}", file=sys.stderr, flush=True)
    # What torchrun would set as well, with a warning for each node.
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    asked_to_stop: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        asked_to_stop.append(number)
        for torchrun in running:
            if len(asked_to_stop) == 1:
                torchrun.terminate()
            else:
                os.write(2, b"still saving; `kill -9 %d` ends the job at once\n" % torchrun.pid)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    die = die_with(os.getpid())
    try:
        # In a process group of its own, which Ctrl-C does not reach: torchrun abandons its ranks
        # where more signals come while it waits for them to save.
        with subprocess.Popen(words, process_group=0, preexec_fn=die, env=env) as torchrun:
            running.append(torchrun)
            if asked_to_stop:
                torchrun.terminate()
            code = torchrun.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked_to_stop:
        sys.exit(128 + asked_to_stop[0])  # a sweep must not go on to its next job
    result = run_dir / "result.json"
    if code or not result.is_file():
        raise JobFailed(f"the job ended with code {code}; logs: {run_dir}/log/")
    return float(json.loads(result.read_text())["objective"])
