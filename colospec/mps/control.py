"""Talk to an MPS control daemon through NVIDIA's control program.

CUDA silently runs without MPS when it cannot reach the daemon, so the daemon's own list of clients
is the only proof that a process is one.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from colospec.mps.errors import MpsError

PROGRAM = "nvidia-cuda-mps-control"
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
ASK_S = 5.0
POLL_S = 0.05
BUSY = "Cannot send command"


@dataclass(frozen=True)
class Control:
    """The daemon whose pipes lie in `pipe`."""

    pipe: Path

    def ask(self, command: str, *, timeout_s: float = ASK_S) -> str:
        """Send one command and return the answer; raises MpsError if there is none.

        A daemon hears one question at a time and turns others away, so it is asked again.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            done = self._run(command, max(deadline - time.monotonic(), POLL_S))
            if done.returncode == 0:
                return done.stdout
            said = " ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}"
            if BUSY not in said or time.monotonic() > deadline:
                raise MpsError(f"no MPS control daemon answers in {self.pipe}: {said}")
            # All ranks ask at one time; they should not do so again.
            time.sleep(POLL_S * random.uniform(0.5, 3.0))

    def _run(self, command: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [PROGRAM],
                input=f"{command}\n",
                env={**os.environ, PIPE_VARIABLE: str(self.pipe)},
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise MpsError(missing_program()) from None
        except subprocess.TimeoutExpired:
            raise MpsError(
                f"the MPS control daemon in {self.pipe} did not answer {command!r} "
                f"within {timeout_s:g} s"
            ) from None
        except OSError as error:
            raise MpsError(f"{PROGRAM} cannot be run: {error}") from None

    def servers(self) -> list[int]:
        """Return the pids of the daemon's servers; there is none before the first client."""
        return _pids(self.ask("get_server_list"))

    def clients(self) -> set[int]:
        """Return the pids of all clients."""
        return {pid for s in self.servers() for pid in _pids(self.ask(f"get_client_list {s}"))}

    def wait_for_client(self, pid: int, *, patience_s: float) -> set[int]:
        """Look for client `pid` for up to `patience_s` seconds; return all clients seen last."""
        deadline = time.monotonic() + patience_s
        while pid not in (seen := self.clients()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return seen


def missing_program() -> str:
    """Say how to get the control program."""
    return (
        f"{PROGRAM} is not on PATH; it comes with the NVIDIA driver (in a container: "
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility, or mount it from the host)"
    )


def _pids(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]
