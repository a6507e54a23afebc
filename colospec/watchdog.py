"""A thread in every rank that ends the job when any rank is in trouble.

It looks at five things ten times a second: the first error of the job (a store key), the death of a
rank on this node (pidfd), the death of torchrun, a request to stop, and how long this rank's own
phase has lasted. A rank blocked in C, in a collective or on a dead peer cannot look for itself;
without the watchdog only torchrun's SIGKILL would end it, half a minute later.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from colospec.log import dump_stacks, rank_file
from colospec.signals import StopSignals
from colospec.store import ERROR_KEY, STOP_KEY, JobStore, stop_key
from colospec.topology import Place

PERIOD_S = 0.1
STARTING = ("start", "load", "attach")
"""Phases before the first step. In these a rank may wait for one that a signal has ended: a process
that is still importing dies of SIGTERM, and has no watchdog yet to tell the others."""
log = logging.getLogger(__name__)


class JobError(RuntimeError):
    """The first error of the job, wherever it happened."""


@dataclass(frozen=True)
class End:
    """Why the job ends before its plan does. The first end of any rank stands for the job.

    `is_stop`: somebody asked `node` for it, and no work was begun; no failure that the torchrun of
    that node should mend.
    """

    rank: int
    node: int
    cause: str
    is_stop: bool = False


class Watchdog:
    """Watches until `stop`. `beat` says that this rank makes progress; `phase` names its work.

    Made and stopped in the main thread: SIGTERM and SIGINT no longer end the process.
    """

    def __init__(self, store: JobStore, place: Place, local: tuple[Place, ...]) -> None:
        self.stop_requested = threading.Event()
        self.before_abort: Callable[[], None] = lambda: None
        """Called once before the process ends because of a foreign error; it must be quick."""
        self._store = store
        self._place = place
        self._signals = StopSignals()
        self._local = {other.rank: other for other in local if other.rank != place.rank}
        self._pidfds: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._parent = os.getppid()
        self._phase = "start"
        self._limit_s = float("inf")
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._looking = threading.Lock()
        self._abort_lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Publish this process and begin to watch."""
        self._store.set(f"pid/{self._place.rank}", str(os.getpid()).encode())
        self._thread.start()

    def stop(self) -> None:
        """Say that this rank ends as it should, and watch no more."""
        self._ended.set()
        self._thread.join(timeout=5)
        self._store.set(f"done/{self._place.rank}", b"1")
        for fd in self._pidfds.values():
            os.close(fd)
        self._pidfds.clear()
        self._signals.close()

    def phase(self, name: str, limit_s: float) -> None:
        """Begin a phase: without a `beat` within `limit_s` seconds the job ends with an error."""
        self._phase, self._limit_s = name, limit_s
        self.beat()
        log.debug("phase %s", name)

    def beat(self) -> None:
        """Note progress inside the phase."""
        self._since = time.monotonic()

    def record(self, cause: str, *, is_stop: bool = False) -> End:
        """Make `cause` the job's end unless there is one; return the first one.

        Only the rank whose end is the first says so on the console.
        """
        own = End(self._place.rank, self._place.node, cause, is_stop)
        kept = self._store.set_first(ERROR_KEY, json.dumps(asdict(own)).encode())
        first = End(**json.loads(kept))
        if first == own:
            log.log(logging.WARNING if is_stop else logging.ERROR, "%s", cause)
        return first

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_S):
            try:
                self.look()
            except Exception as error:
                if self._ended.is_set():
                    return
                self._lost(f"torchrun's store is gone, torchrun has ended ({error})")

    def look(self) -> None:
        """Look once at everything, from any thread; the process ends here if the job does."""
        with self._looking:
            self._look()

    def _look(self) -> None:
        if os.getppid() != self._parent:
            self._lost(f"torchrun (pid {self._parent}) has died")
        # First of all: the death after which torchrun sends its SIGTERM is then seen below.
        signal = self._signals.seen()
        self._find_local_ranks()
        for rank in self._dead_ranks():
            self._report_death(rank)
        if (first := self._store.peek(ERROR_KEY)) is not None:
            self.abort(End(**json.loads(first)))
        if not self.stop_requested.is_set():
            self._look_for_stop(signal)
        age = time.monotonic() - self._since
        if age > self._limit_s:
            self.record(
                f"{self._place} made no progress in phase {self._phase} for {age:.0f} s "
                f"(limit {self._limit_s:g} s, see limit.* settings)"
            )

    def _look_for_stop(self, signal: str | None) -> None:
        """Honour a request to stop, after a look that found no error: torchrun's SIGTERM after a
        rank's death must not pass for a wish to stop. All ranks learn of it.

        Before the first step there is nothing to finish or to save, and the rank that got the
        signal just ends the job. So it does where a rank has failed before it joined: torchrun's
        SIGTERM is all that says so.
        """
        is_starting = self._phase in STARTING
        if signal is not None:
            self._store.set(stop_key(self._place.node), b"1")
            self._store.set(STOP_KEY, b"1")
        elif is_starting or self._store.peek(STOP_KEY) is None:
            return
        self.stop_requested.set()
        cause = signal or "a signal to another rank"
        if is_starting:
            absent = sorted(self._local.keys() - self._pids.keys())
            text = (
                f"{self._place}: {cause} in phase {self._phase}: the job ends before its first "
                "step, with nothing to save"
            )
            if absent:
                text += (
                    f"; ranks {absent} of this node had not joined it, and if nobody asked for "
                    "this stop, they have failed: see above"
                )
            self.record(text, is_stop=True)
        else:
            log.info("%s: stopping after the step in flight, with a checkpoint", cause)

    def _find_local_ranks(self) -> None:
        for rank in self._local.keys() - self._pids.keys():
            if (pid := self._store.peek(f"pid/{rank}")) is not None:
                self._pids[rank] = int(pid)
                try:
                    self._pidfds[rank] = os.pidfd_open(int(pid))
                except ProcessLookupError:
                    self._report_death(rank)

    def _dead_ranks(self) -> list[int]:
        poll = select.poll()
        for fd in self._pidfds.values():
            poll.register(fd, select.POLLIN)
        dead = {fd for fd, _ in poll.poll(0)}
        return [rank for rank, fd in self._pidfds.items() if fd in dead]

    def _report_death(self, rank: int) -> None:
        if (fd := self._pidfds.pop(rank, None)) is not None:
            os.close(fd)
        if self._store.peek(f"done/{rank}") is None:
            phase = self._store.peek(f"phase/{rank}")
            at = f" in phase {phase.decode()}" if phase else ""
            self.record(
                f"{self._local[rank]} died: pid {self._pids[rank]} ended without a word{at} "
                "(killed, out of memory, or crashed in native code); see its log"
            )

    def _lost(self, cause: str) -> NoReturn:
        """End this process where the others cannot be told."""
        with contextlib.suppress(Exception):
            log.error("ended by: %s", cause)
        self.abort(End(self._place.rank, self._place.node, cause))

    def abort(self, end: End) -> NoReturn:
        """End this process at once, from either thread: the other may be blocked for ever.

        Nothing here may stop the end from coming.
        """
        self._abort_lock.acquire()  # never released: the second caller only waits for the end
        with contextlib.suppress(Exception):
            log.debug("ended by: %s", end.cause)
        is_wish = end.is_stop and end.node == self._place.node
        if not is_wish:
            with contextlib.suppress(Exception):
                dump_stacks()
            record_for_torchrun(end.cause)
        with contextlib.suppress(Exception):
            self.before_abort()  # last: other threads still run, and could begin anew
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(0 if is_wish else 1)


def record_for_torchrun(root_cause: str) -> None:
    """Leave the root cause where torchrun's closing summary finds it.

    The summary repeats what every rank left, so none leaves a traceback; they are in the logs.
    """
    if (file := rank_file()) is not None:
        root_cause += f" (tracebacks: {file.parent})"
    try:
        raise JobError(root_cause) from None
    except JobError as error:
        error.__traceback__ = None
        with contextlib.suppress(Exception):
            get_error_handler().record_exception(error)
