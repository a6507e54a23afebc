"""SIGTERM and SIGINT as a wish to stop, noticed whatever the main thread is doing.

A Python handler runs in the main thread, and only once that is back from C: not while it waits for
a key of the store or for a collective, which can take half an hour. The interpreter's C handler
writes the number of each signal to a pipe at once, and any thread can read it there.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Catches them from now on; to be made and closed in the main thread."""

    def __init__(self) -> None:
        self._seen: str | None = None
        self._pipe, self._written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            # With a handler, the signal ends nothing; all that is to be known is in the pipe.
            signal.signal(number, lambda *_: None)

    def seen(self) -> str | None:
        """Return the name of the first of them that came, or None; never waits."""
        with suppress(BlockingIOError):
            for number in os.read(self._pipe, 4096):
                if number in STOP_SIGNALS and self._seen is None:
                    self._seen = signal.Signals(number).name
        return self._seen

    def close(self) -> None:
        """Note no more signals; they still end nothing."""
        signal.set_wakeup_fd(-1)
        os.close(self._pipe)
        os.close(self._written)
