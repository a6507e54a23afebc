"""Build something once per machine, whoever asks and however many ask at the same time."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def build_once(path: Path, build: Callable[[Path], None], what: str) -> None:
    """Make `path` by `build(temporary directory)`, unless it is there."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock"), what):
        if path.is_dir():
            return
        for leftover in path.parent.glob(f".{path.name}-*"):
            shutil.rmtree(leftover)
        log.info("building %s in %s", what, path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        build(temporary)
        temporary.chmod(0o755)  # mkdtemp's is private, but a cache may be shared
        temporary.rename(path)


@contextmanager
def _locked(file: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock; the kernel frees it however a process ends."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which is building %s", what)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
