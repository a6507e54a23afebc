"""Memory that two processes share, and the identity of the process that owns it.

Memory is an anonymous file (memfd) that the owner creates and the other side opens through the
owner's /proc entry: nothing has a name that could be left behind, and the size of /dev/shm does not
matter. A mapping lives as long as something refers to it, also after the death of its owner.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from colospec.ring.errors import Corrupt, PeerDied

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@dataclass(frozen=True)
class Process:
    """One process of one boot; `start_time` (clock ticks) tells it from a later one of its pid."""

    pid: int
    start_time: int
    namespace: str
    uid: int

    @classmethod
    def current(cls) -> Process:
        """Describe the calling process."""
        namespace = str(Path("/proc/self/ns/pid").readlink())
        return cls(os.getpid(), _start_time("self"), namespace, os.getuid())

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Process:
        """Read what `dataclasses.asdict` made of one. Raises ValueError, TypeError or KeyError."""
        pid = int(fields["pid"])
        if not 0 < pid < 1 << 31:
            raise ValueError(f"pid {pid}")
        return cls(pid, int(fields["start_time"]), str(fields["namespace"]), int(fields["uid"]))

    def watch(self) -> int:
        """Return a pidfd of this process, which becomes readable when it dies.

        Raises PeerDied if it is gone, and RuntimeError where it cannot be seen from here.
        """
        here = Process.current()
        if here.namespace != self.namespace:
            raise RuntimeError(
                f"process {self.pid} runs in another PID namespace ({self.namespace}, here "
                f"{here.namespace}); run both ranks in one container, or share its PID namespace "
                "(docker run --pid=container:NAME)"
            )
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            raise PeerDied(f"process {self.pid} has died before it was attached") from None
        except OSError as error:
            raise RuntimeError(
                f"cannot watch process {self.pid}: pidfd_open failed ({error.strerror}); it needs "
                "Linux 5.3 and a container whose seccomp profile allows it (Docker 20.10 or newer)"
            ) from None
        try:
            if _start_time(str(self.pid)) != self.start_time:
                raise PeerDied(f"process {self.pid} has died and its pid is another's now")
        except BaseException as error:
            os.close(pidfd)
            if isinstance(error, (FileNotFoundError, ProcessLookupError)):
                raise PeerDied(f"process {self.pid} has died before it was attached") from None
            raise
        return pidfd


class SharedFile:
    """An anonymous file of fixed size that this process owns until `close`."""

    def __init__(self, name: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            self.close()
            raise

    def map(self) -> mmap.mmap:
        """Map the whole file; the mapping does not need this object."""
        return mmap.mmap(self.fd, self.nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let nobody attach any more. Mappings stay. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_foreign(owner: Process, pidfd: int, fd: int, nbytes: int) -> mmap.mmap:
    """Map file `fd` of the process that `Process.watch` gave `pidfd` for.

    Raises PeerDied, Corrupt (not of `nbytes`), or RuntimeError where the system forbids it.
    """
    path = f"/proc/{owner.pid}/fd/{fd}"
    try:
        own_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        raise PeerDied(f"process {owner.pid} has withdrawn its ring, or died") from None
    except PermissionError as error:
        if has_died(pidfd):
            # The /proc entry of a zombie belongs to root.
            raise PeerDied(f"process {owner.pid} has died before it was attached") from None
        raise RuntimeError(_explain_refusal(owner, path, error)) from None
    try:
        if (found := os.fstat(own_fd).st_size) != nbytes:
            raise Corrupt(f"{path} has {found} bytes, expected {nbytes}")
        return mmap.mmap(own_fd, nbytes)
    finally:
        os.close(own_fd)


def has_died(pidfd: int) -> bool:
    """Return whether the process of a pidfd has ended (it may still be a zombie)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _explain_refusal(owner: Process, path: str, error: OSError) -> str:
    uid = os.getuid()
    remedy = "run both ranks as one user in one container"
    if uid == owner.uid:
        remedy = (
            "the users are the same, so a security policy keeps processes apart: run both ranks in "
            "one container (docker run --cap-add=SYS_PTRACE) and without prctl(PR_SET_DUMPABLE, 0)"
        )
    return (
        f"cannot open {path} ({error.strerror}): it belongs to uid {owner.uid}, this process runs "
        f"as uid {uid}; {remedy}"
    )


def boot_id() -> str:
    """Return the identity of this boot of this host (containers of a host share it)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: str) -> int:
    # Field 22 of stat; field 2, the command, may hold spaces and parentheses.
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])
