from mmap import mmap
from typing import TypeAlias

READY: int
AGAIN: int
DEAD: int
CORRUPT: int
END: int
ERROR: int
CLOSED: int
LABEL_BYTES: int
TEXT_BYTES: int
CONTROL_BYTES: int
HEADER_BYTES: int

# phase (enum ring_phase or a record's kind), since when and time waited (ns, CLOCK_MONOTONIC)
_Side: TypeAlias = tuple[int, int, int]

class Ring:
    def __new__(
        cls,
        memory: mmap | bytearray | memoryview,
        is_writer: bool,
        num_slots: int,
        start_seq: int,
        label: bytes,
        /,
    ) -> Ring: ...
    def wait(
        self, timeout_s: float, held: int = ..., peer_fd: int = ..., /
    ) -> tuple[int, int, bytes]: ...
    def publish(self, note: bytes, /) -> int: ...
    def release(self, count: int, /) -> int: ...
    def leave(self, kind: int, text: bytes, /) -> None: ...
    def state(self) -> tuple[int, int, _Side, _Side]: ...

def cuda_driver_error() -> str | None: ...
