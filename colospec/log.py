"""Where words go: every rank to `<run_dir>/log/rank<N>.log`, rank 0 to the console as well."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import signal
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console


class QuietConsole(Console):
    """A console whose reader may go away (`| head`): the run goes on without it."""

    def on_broken_pipe(self) -> None:
        """Do nothing; rich would end the process."""


console = QuietConsole(stderr=True, soft_wrap=True, highlight=False)
_stacks: list[TextIO] = []
FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"


class ConsoleHandler(logging.Handler):
    """Prints messages on the terminal, above a progress bar if one is there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; only warnings and errors say their level."""
        with contextlib.suppress(OSError, ValueError):
            self._print(record)

    @staticmethod
    def _print(record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            console.print(f"error: {text}", style="bold red", markup=False)
        elif record.levelno >= logging.WARNING:
            console.print(f"warning: {text}", style="yellow", markup=False)
        else:
            console.print(text, markup=False)


def to_console(level: int = logging.INFO) -> None:
    """Send our messages to the console alone (before there is a run directory)."""
    logger = logging.getLogger("colospec")
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handler = ConsoleHandler()
    handler.setLevel(level)
    logger.addHandler(handler)


def setup(run_dir: Path, rank: int) -> None:
    """Send this rank's messages to its file; on the console, rank 0 talks and the others warn.

    SIGUSR1 makes the rank append the Python stacks of its threads to its file.
    """
    to_console(logging.INFO if rank == 0 else logging.ERROR)
    file = run_dir / "log" / f"rank{rank}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = file.open("a", buffering=1)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    logging.getLogger("colospec").addHandler(handler)
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)
    _stacks.append(stream)


def rank_file() -> Path | None:
    """Return this rank's file, after `setup`."""
    return Path(_stacks[-1].name) if _stacks else None


def dump_stacks() -> None:
    """Append the Python stacks of all threads to this rank's file (stderr before `setup`)."""
    faulthandler.dump_traceback(_stacks[-1] if _stacks else sys.stderr, all_threads=True)


def is_terminal() -> bool:
    """Tell whether a progress bar makes sense."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
