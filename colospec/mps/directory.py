"""Private directories of MPS daemons: made, found and swept without touching anybody else's.

A keeper holds a lock (flock) on its directory itself. The kernel lets go of it when the keeper
dies, however it dies, so an unlocked directory is one of a dead keeper. The path is short, because
it holds sockets, whose paths are limited to 107 bytes; and it is not under XDG_RUNTIME_DIR, which
is removed at the end of a login session that a job may outlive. (systemd-tmpfiles, which empties
/tmp, leaves locked directories alone.)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from colospec import durable
from colospec.mps.errors import DaemonDied, MpsError

ROOT = Path("/tmp")
PREFIX = "colospec-mps-"
_RECORD = "keeper.json"
_TRIES = 100


@dataclass(frozen=True)
class Record:
    """What a keeper writes into its directory once it has started its daemon: pids, and the PID
    namespace that they belong to (containers may share /tmp)."""

    keeper: int
    owner: int
    daemon: int
    namespace: str


def pid_namespace() -> str:
    """Return the identity of this process's PID namespace."""
    return str(Path("/proc/self/ns/pid").readlink())


@contextlib.contextmanager
def private_directory(root: Path) -> Iterator[Path]:
    """Make a locked directory of mode 0700 with pipe/ and log/ in it; remove it at the end.

    After a DaemonDied it stays, with the logs, until the next start sweeps it. Raises MpsError for
    a root that others could tamper with.
    """
    _check_root(root)
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        # A sweep may see it before the lock and remove it: then make another one.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                break
            os.close(lock)
    else:
        raise MpsError(f"every new directory in {root} is removed at once; see who removes it")
    is_evidence = False
    try:
        (path / "pipe").mkdir(0o700)
        (path / "log").mkdir(0o700)
        yield path
    except DaemonDied:
        is_evidence = True
        raise
    finally:
        if not is_evidence:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def sweep(root: Path) -> None:
    """Remove the directories that dead keepers of this user left in `root`."""
    for path in _ours(root):
        with contextlib.suppress(OSError), _lock(path, fcntl.LOCK_EX) as is_free:
            if is_free:
                shutil.rmtree(path, ignore_errors=True)


def live(root: Path) -> dict[Path, Record]:
    """Return the directories of this user's live keepers that have started a daemon."""
    records = {}
    for path in _ours(root):
        with (
            contextlib.suppress(OSError, ValueError, TypeError),
            _lock(path, fcntl.LOCK_SH) as is_free,
        ):
            if not is_free:
                records[path] = Record(**json.loads((path / _RECORD).read_text()))
    return records


def write_record(path: Path, record: Record) -> None:
    """Publish `record` in a keeper's directory, whole or not at all."""
    durable.write(path / _RECORD, json.dumps(asdict(record)))


def _ours(root: Path) -> list[Path]:
    """Directories by our name that this user owns and nobody else may write; no symbolic links."""
    found = []
    for path in sorted(root.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):
            facts = path.lstat()
            mode = stat.S_IMODE(facts.st_mode)
            if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and mode == 0o700:
                found.append(path)
    return found


@contextlib.contextmanager
def _lock(path: Path, how: int) -> Iterator[bool]:
    """Try to lock `path` in one of flock's ways; tells whether no keeper holds it."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)


def _check_root(root: Path) -> None:
    try:
        facts = root.lstat()
    except OSError as error:
        raise MpsError(f"no place for the MPS daemon's directory: {error}") from None
    if not stat.S_ISDIR(facts.st_mode):
        raise MpsError(f"{root} is not a directory (a symbolic link will not do)")
    others_write = bool(facts.st_mode & 0o022)
    if facts.st_uid not in (0, os.getuid()) or (others_write and not facts.st_mode & stat.S_ISVTX):
        raise MpsError(
            f"{root} (owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o}) lets other users "
            f"replace the MPS daemon's pipes; type: chmod +t {root}"
        )
