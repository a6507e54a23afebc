"""Start and stop keepers: by the first rank of a node, by the command line, by the doctor."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from colospec.mps import directory
from colospec.mps.control import Control
from colospec.mps.errors import MpsError
from colospec.mps.keeper import START_S

PROBE_S = 60.0
STOP_S = 15.0
_GRACE_S = 15.0


@dataclass(frozen=True)
class Started:
    """A daemon that answers, and its keeper."""

    pipe: Path
    daemon: int
    keeper: subprocess.Popen[str]


def start_keeper(
    owner: int, *, gpus: str, root: Path = directory.ROOT, start_s: float = START_S
) -> Started:
    """Start a keeper in a session of its own and wait until its daemon answers.

    The daemon ends with process `owner`. Raises MpsError with the keeper's words.
    """
    words = [sys.executable, "-m", "colospec.mps", "keep", f"--owner={owner}", f"--gpus={gpus}"]
    keeper = subprocess.Popen(
        [*words, f"--root={root}", f"--start-s={start_s:g}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    limit_s = start_s + _GRACE_S
    said = _first_json_line(keeper, limit_s)
    assert keeper.stdout is not None
    keeper.stdout.close()
    if "pipe" in said:
        return Started(Path(said["pipe"]), int(said["daemon"]), keeper)
    keeper.terminate()
    raise MpsError(said["error"])


def stop_keeper(home: Path, record: directory.Record, *, limit_s: float = STOP_S) -> None:
    """Ask the keeper of directory `home` to stop, and wait until it has removed it.

    Raises MpsError if it is still there after `limit_s` seconds.
    """
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(record.keeper)
        try:
            command = Path(f"/proc/{record.keeper}/cmdline").read_bytes()
            if b"colospec.mps" in command:  # else the pid is somebody else's by now
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except FileNotFoundError:
            pass
        finally:
            os.close(pidfd)
    deadline = time.monotonic() + limit_s
    while home in directory.live(home.parent):
        if time.monotonic() > deadline:
            raise MpsError(
                f"the keeper of {home} (pid {record.keeper}) did not stop within {limit_s:g} s; "
                f"type: kill -9 {record.keeper}"
            )
        time.sleep(0.02)


def stop_all_of(owner: int, *, root: Path = directory.ROOT) -> int:
    """Stop every daemon that lives for process `owner` (before a restart); return how many."""
    here = directory.pid_namespace()
    found = [
        item
        for item in directory.live(root).items()
        if (item[1].owner, item[1].namespace) == (owner, here)
    ]
    for home, record in found:
        stop_keeper(home, record)
    return len(found)


def probe(pipe: Path, gpus: str, *, limit_s: float = PROBE_S) -> None:
    """Prove that the daemon in `pipe` serves: a short-lived process becomes its client.

    Raises MpsError with what CUDA said, or if the daemon does not list the process.
    """
    env = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(pipe), "CUDA_VISIBLE_DEVICES": gpus}
    process = subprocess.Popen(
        [sys.executable, "-m", "colospec.mps.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    with process:
        try:
            said = _first_json_line(process, limit_s)
            if "error" in said:
                raise MpsError(f"CUDA does not work through the MPS daemon: {said['error']}")
            require_client(Control(pipe), process.pid)
            process.communicate("", timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise MpsError(f"a CUDA process did not end within {limit_s:g} s under MPS") from None
        finally:
            process.kill()


def require_client(control: Control, pid: int, *, patience_s: float = 5.0) -> None:
    """Raise MpsError unless process `pid` becomes a client of the daemon within `patience_s`."""
    clients = control.wait_for_client(pid, patience_s=patience_s)
    if pid in clients:
        return
    listed = f"it lists the clients {sorted(clients)}" if clients else "it has no client"
    raise MpsError(
        f"process {pid} runs CUDA without MPS: the daemon in {control.pipe} does not know it "
        f"({listed}). Either CUDA started before the MPS settings were in its environment, or the "
        "daemon and this process are in two PID namespaces (containers) and number processes "
        "differently: run both in one container"
    )


def _first_json_line(process: subprocess.Popen[str], limit_s: float) -> dict[str, str]:
    """Wait for the one line by which a helper reports; what else it wrote becomes an error."""
    assert process.stdout is not None
    fd, text = process.stdout.fileno(), b""
    name = shlex.join(process.args) if isinstance(process.args, list) else str(process.pid)
    deadline = time.monotonic() + limit_s
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            break
        chunk = os.read(fd, 65536)
        text += chunk
        for line in text.split(b"\n")[:-1]:
            if line.startswith(b"{"):
                return dict(json.loads(line))
        if not chunk:
            words = " ".join(text.decode(errors="replace").split()[-60:])
            return {"error": f"{name} ended without a report: {words}"}
    return {"error": f"{name} did not report within {limit_s:g} s"}
