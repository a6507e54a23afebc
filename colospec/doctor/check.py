"""What a check is: a function in a process of its own, with a limit, that answers with one line.

So none can crash, hang or otherwise disturb another.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """What a check found; `fix` is what to type."""

    status: str
    """ok, note or FAIL."""
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<5} {self.text}" + (f"; fix: {self.fix}" if self.fix else "")


ok = partial(Line, "ok")
note = partial(Line, "note")
fail = partial(Line, "FAIL")


@dataclass(frozen=True)
class Check:
    """One thing to look at, and how long it may take."""

    name: str
    look: Callable[[], Line]
    limit_s: float = 30.0


def run(check: Check) -> Line:
    """Run one check in a process of its own; whatever happens there becomes a line."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_in_child, args=(check, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(check.limit_s):
            return fail(f"{check.name}: no result within {check.limit_s:g} s", "see what hangs")
        line = receiver.recv()
        assert isinstance(line, Line)
        return line
    except EOFError:
        process.join(5)
        return fail(f"{check.name}: the check ended with code {process.exitcode}", "see dmesg")
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join(5)


def _run_in_child(check: Check, sender: Connection) -> None:
    os.setsid()  # so that what it starts can be ended with it
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # libraries talk when they are imported
        os.dup2(nowhere.fileno(), 2)
        try:
            line = check.look()
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            line = fail(f"{check.name}: {said}", "read the message")
        sender.send(line)
        sender.close()
