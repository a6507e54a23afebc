"""The process that owns one MPS control daemon: it ends when its owner ends, however that ends.

The owner is the torchrun agent (or a shell), so no rank's death takes the daemon from the others.
If the keeper itself is killed, the kernel ends the daemon (PR_SET_PDEATHSIG), and the directory
that remains is swept by the next start.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from colospec.mps import directory
from colospec.mps.control import ASK_S, PIPE_VARIABLE, POLL_S, PROGRAM, Control, missing_program
from colospec.mps.errors import DaemonDied, MpsError
from colospec.mps.gpus import VISIBLE_VARIABLE

START_S = 20.0
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
PR_SET_PDEATHSIG = 1
# In the daemon's environment they would be the default of all clients.
_CLIENTS_OWN = (
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "CUDA_MPS_CLIENT_PRIORITY",
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
)
_OPEN_FILES = 65536  # the daemon wants at least 16384
_QUIT_S = 2  # servers that still have clients after that are ended
_ANSWER_S = 2.5
_END_S = 1.0
_KILL_S = 5.0
_ALONE_MS = 1000  # whoever ends all processes of a job at once ends the daemon and the owner
_libc = ctypes.CDLL(None, use_errno=True)


def keep(owner: int, *, gpus: str, root: Path, start_s: float) -> int:
    """Run a daemon for the GPUs in `gpus` (UUIDs) until process `owner` ends; return an exit code.

    Once the daemon answers, one line of JSON on stdout says {"pipe", "daemon"}; if it does not
    within `start_s` seconds, {"error"}. SIGTERM, SIGINT and SIGHUP stop it. Call it from the main
    thread: the kernel ends the daemon with the thread that started it. If the daemon ends by
    itself, its directory stays, with its logs, until the next start.
    """
    try:
        with _ends(owner) as ends:
            directory.sweep(root)
            with directory.private_directory(root) as home:
                _run(home, ends, owner=owner, gpus=gpus, start_s=start_s)
    except MpsError as error:
        _report({"error": str(error)})
        return 1
    return 0


def _run(home: Path, ends: select.poll, *, owner: int, gpus: str, start_s: float) -> None:
    control = Control(home / "pipe")
    daemon = _start_daemon(home, gpus)
    answers = False
    try:
        record = directory.Record(os.getpid(), owner, daemon.pid, directory.pid_namespace())
        directory.write_record(home, record)
        _wait_until_ready(control, daemon, ends, home=home, start_s=start_s)
        answers = True
        _report({"pipe": str(control.pipe), "daemon": daemon.pid})
        _leave_terminal(home)
        daemon_fd = os.pidfd_open(daemon.pid)
        ends.register(daemon_fd, select.POLLIN)
        ends.poll()  # for as long as the owner lives: the one wait without a deadline
        ends.unregister(daemon_fd)
        if not ends.poll(_ALONE_MS):
            raise DaemonDied(f"{PROGRAM} ended with code {daemon.poll()} before its owner")
    finally:
        _stop_daemon(daemon, control if answers else None)


@contextmanager
def _ends(owner: int) -> Iterator[select.poll]:
    """Watch for the end of `owner` and for signals that ask to stop."""
    try:
        owner_fd = os.pidfd_open(owner)
    except ProcessLookupError:
        raise MpsError(f"the owner of the MPS daemon, process {owner}, is gone") from None
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    ends = select.poll()
    ends.register(owner_fd, select.POLLIN)
    ends.register(reader, select.POLLIN)
    try:
        yield ends
    finally:
        os.close(owner_fd)


def _start_daemon(home: Path, gpus: str) -> subprocess.Popen[bytes]:
    env = {name: value for name, value in os.environ.items() if name not in _CLIENTS_OWN}
    env |= {
        PIPE_VARIABLE: str(home / "pipe"),
        LOG_VARIABLE: str(home / "log"),
        VISIBLE_VARIABLE: gpus,
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _OPEN_FILES:
        wanted = _OPEN_FILES if hard < 0 else min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    with (home / "log" / "daemon.log").open("wb") as output:
        try:
            return subprocess.Popen(
                [PROGRAM, "-f"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                preexec_fn=die_with(os.getpid()),
            )
        except FileNotFoundError:
            raise MpsError(missing_program()) from None
        except OSError as error:
            raise MpsError(f"{PROGRAM} cannot be run: {error}") from None


def die_with(parent: int) -> Callable[[], None]:
    """Return a preexec_fn: the kernel sends the child SIGTERM when the thread of process `parent`
    that starts it ends."""

    def in_child() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the line above

    return in_child


def _wait_until_ready(
    control: Control,
    daemon: subprocess.Popen[bytes],
    ends: select.poll,
    *,
    home: Path,
    start_s: float,
) -> None:
    deadline = time.monotonic() + start_s
    why = "no answer yet"
    while (left := deadline - time.monotonic()) > 0:
        if ends.poll(int(POLL_S * 1000)):
            raise MpsError("the MPS daemon's owner ended, or asked it to stop, while it started")
        if daemon.poll() is not None:
            raise MpsError(f"{PROGRAM} ended at once with code {daemon.returncode}{_said(home)}")
        try:
            control.ask("get_server_list", timeout_s=min(left, ASK_S))
            return
        except MpsError as error:
            why = str(error)
    raise MpsError(f"{PROGRAM} was not ready within {start_s:g} s: {why}{_said(home)}")


def _said(home: Path) -> str:
    """Return the end of what the daemon wrote."""
    lines: list[str] = []
    for file in sorted((home / "log").glob("*.log")):
        with contextlib.suppress(OSError):
            lines += file.read_text(errors="replace").splitlines()[-5:]
    return "; it wrote: " + " | ".join(lines) if lines else ""


def _report(facts: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # whoever started us may be gone; the owner decides
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


def _leave_terminal(home: Path) -> None:
    """Keep nobody's pipe open: a reader of the job's output must see its end."""
    log = os.open(home / "log" / "keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def _stop_daemon(daemon: subprocess.Popen[bytes], control: Control | None) -> None:
    """Ask it if it answers, then tell it, then kill it; every step has its deadline."""
    if control is not None and daemon.poll() is None:
        with contextlib.suppress(MpsError, subprocess.TimeoutExpired):
            control.ask(f"quit -t {_QUIT_S}", timeout_s=_ANSWER_S)
            daemon.wait(_END_S)
    if daemon.poll() is None:
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(_END_S)
    if daemon.poll() is None:
        daemon.kill()
        daemon.wait(_KILL_S)
