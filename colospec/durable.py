"""Put a finished file or directory in place: a crash leaves the old one or the new one, never half.

A directory is filled as a sibling whose name ends in `.tmp`, and then `publish` gives it its name.
What a killed process leaves behind ends in `.tmp` too; `clear` removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

TEMPORARY = ".tmp"
# What `publish` has put aside for a moment: a whole directory, always.
OLD = f".old{TEMPORARY}"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write(file: Path, text: str) -> None:
    """Give `file` this content, whole or not at all, on disk when this returns. Raises OSError."""
    temporary = file.with_name(file.name + TEMPORARY)
    try:
        temporary.write_text(text)
        sync(temporary)
        temporary.rename(file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(file.parent)


def publish(temporary: Path, final: Path) -> None:
    """Sync all files of `temporary` to disk and give it the name `final`.

    A directory that has this name is replaced, in one step where the file system can exchange
    names, and then removed. Elsewhere a crash may leave no `final`, until `restore` brings the old
    one back. Raises OSError.
    """
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    if not final.exists():
        temporary.rename(final)
        sync(final.parent)
        return
    if not _exchange(temporary, final):
        old = final.with_name(final.name + OLD)
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        sync(final.parent)
        # Removing is not atomic: under its own name, half of it could be restored.
        old.rename(temporary)
    sync(final.parent)
    shutil.rmtree(temporary, ignore_errors=True)


def restore(final: Path) -> None:
    """Bring back the directory `final` if a `publish` was killed while it was put aside.

    Raises OSError.
    """
    old = final.with_name(final.name + OLD)
    if old.exists() and not final.exists():
        old.rename(final)
        sync(final.parent)


def sync(path: Path) -> None:
    """Wait until the file, or the list of files of the directory, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    return int(done) == 0


def discard(directory: Path) -> None:
    """Remove a directory; interrupted, it leaves only what ends in `.tmp`. Raises OSError."""
    doomed = directory.with_name(f"{directory.name}.gone{TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def clear(parent: Path) -> list[Path]:
    """Remove every directory of `parent` that was not finished; return them, as they were called.

    A thread that still writes into one finds its path gone, and cannot fill it again meanwhile.
    Raises OSError.
    """
    for old in parent.glob(f"*{OLD}"):
        restore(old.with_name(old.name.removesuffix(OLD)))
    unfinished = sorted(parent.glob(f"*{TEMPORARY}"))
    for directory in unfinished:
        with contextlib.suppress(FileNotFoundError):  # just then published or removed
            discard(directory)
    return unfinished
