from mmap import mmap
from typing import TypeAlias

READY: int
AGAIN: int
END: int
ERROR: int
CLOSED: int
DEAD: int
CORRUPT: int
RECORD_END: int
RECORD_ERROR: int
RECORD_CLOSE: int
TEXT_BYTES: int
ALIGNMENT: int

# name, dtype code, itemsize, width, offset
_Tensor: TypeAlias = tuple[str, int, int, int, int]
# num_slots, slot_bytes, max_tokens, max_sequences, start_seq, table
_Geometry: TypeAlias = tuple[int, int, int, int, int, tuple[_Tensor, ...]]
# enum ring_phase, seconds since it began, seconds waited in acquire
_Side: TypeAlias = tuple[int, float, float]

class Ring:
    def __new__(
        cls, memory: mmap | bytearray | memoryview, geometry: _Geometry = ..., /
    ) -> Ring: ...
    def acquire(self, timeout_s: float, /) -> tuple[int, object]: ...
    def publish(
        self,
        epoch: int,
        micro_batch: int,
        step: int,
        digest: int,
        num_tokens: int,
        num_sequences: int,
        /,
    ) -> int: ...
    def release(self, count: int, /) -> int: ...
    def leave(self, kind: int, text: bytes, /) -> None: ...
    def wait_closed(self, timeout_s: float, /) -> int: ...
    def watch(self, pidfd: int, /) -> None: ...
    def state(self) -> tuple[int, int, _Side, _Side]: ...

def control_bytes(num_slots: int, /) -> int: ...
def cuda_driver_error() -> str | None: ...
