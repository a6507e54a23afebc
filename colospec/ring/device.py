"""A ring's memory where slots lie on a GPU: what two processes map, and what streams write.

Two payloads: `ipc`, one allocation per slot in the engine's GPU memory, exported once and mapped
once by the trainer (CUDA IPC); and `host`, the shared file of a CPU ring, pinned, which GPU kernels
write and read over PCIe. Either way slots are CUDA tensors without a copy. The memory is the
driver's, not that of torch's allocator, whose settings (expandable segments) do not matter.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from colospec import _ring

log = logging.getLogger(__name__)


class DeviceBuffer:
    """GPU memory that is not torch's, for torch; `let_go` runs once no tensor refers to it."""

    def __init__(self, pointer: int, nbytes: int, let_go: Callable[[], None]) -> None:
        self.pointer = pointer
        self.nbytes = nbytes
        self.__cuda_array_interface__ = {
            "data": (pointer, False),
            "shape": (nbytes,),
            "strides": None,
            "typestr": "|u1",
            "version": 3,
        }
        # Not at exit: the driver may be gone by then, and takes the memory back itself.
        weakref.finalize(self, let_go).atexit = False

    def tensor(self, device: torch.device) -> Tensor:
        """View all of it, uint8 [nbytes]; the view keeps this object alive."""
        tensor = torch.as_tensor(self, device=device)
        assert tensor.data_ptr() == self.pointer, "a view, not a copy"
        return tensor


class PinnedMapping:
    """A mapping of shared memory that the GPU sees too, at `pointer`, until `close`."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self.nbytes = len(mapping)
        self.pointer = _ring.host_register(mapping)
        self._mapping: mmap.mmap | None = mapping

    def slots(self, num_slots: int, device: torch.device) -> list[Tensor]:
        """View it as `num_slots` equal pieces, uint8 on `device`."""
        whole = DeviceBuffer(self.pointer, self.nbytes, self.close).tensor(device)
        return list(whole.chunk(num_slots))

    def close(self) -> None:
        """Unpin. Idempotent."""
        if self._mapping is not None:
            _ring.host_unregister(self._mapping)
            self._mapping = None


class Streams:
    """How the counters of a ring follow GPU work: each is written by the caller's current stream.

    `by_callback` writes from the host once the stream gets there; None does so where the device
    cannot write from a stream.
    """

    def __init__(
        self,
        ring: _ring.Ring,
        control: mmap.mmap,
        device: torch.device,
        *,
        by_callback: bool | None = None,
    ) -> None:
        self._device = device
        if by_callback is None:
            by_callback = not _ring.can_write_from_stream()
        self._control = PinnedMapping(control)
        ring.use_streams(self._control.pointer, by_callback)

    def current(self) -> int:
        """Return the handle of the stream whose work a publication or a release follows."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def close(self) -> None:
        """Wait for what this device still does with the slots; no counter is written afterwards."""
        try:
            torch.cuda.synchronize(self._device)
        finally:
            self._control.close()


def gpu_uuid(device: torch.device) -> str | None:
    """Return the identity of a GPU whatever its index here; None for a CPU."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def use_device(device: torch.device) -> None:
    """Make torch's context of `device` the calling thread's, for the driver calls that follow."""
    torch.cuda.set_device(device)
    torch.empty(1, device=device)


def allocate(num_slots: int, slot_bytes: int) -> list[DeviceBuffer]:
    """Allocate GPU memory for the slots. Raises MemoryError."""
    buffers = []
    for _ in range(num_slots):
        try:
            pointer = _ring.gpu_alloc(slot_bytes)
        except MemoryError as error:
            raise MemoryError(
                f"no GPU memory for {num_slots} ring slots of {slot_bytes / 2**20:.0f} MiB "
                f"({error}); lower ring.num_slots, data.token_budget or memory.*_fraction"
            ) from None
        buffer = DeviceBuffer(pointer, slot_bytes, _freer(_ring.gpu_free, pointer))
        _ALLOCATED[pointer] = buffer
        buffers.append(buffer)
    return buffers


def own_buffers(pointers: Sequence[int]) -> list[DeviceBuffer]:
    """Return what `allocate` of this process returned: CUDA maps no handle where it was made."""
    return [_ALLOCATED[pointer] for pointer in pointers]


def export(buffers: Sequence[DeviceBuffer], *, required: bool) -> tuple[str, ...]:
    """Return the CUDA IPC handles, in hex; none where CUDA IPC is missing and not `required`.

    Raises RuntimeError if it is missing and required.
    """
    try:
        return tuple(_ring.gpu_export(buffer.pointer).hex() for buffer in buffers)
    except RuntimeError as error:
        explain_missing_ipc(error, required=required)
        return ()


def open_exported(
    handles: Sequence[str], slot_bytes: int, *, required: bool
) -> list[DeviceBuffer] | None:
    """Map another process's slots; None where CUDA IPC is missing and not `required`."""
    buffers = []
    try:
        for handle in handles:
            pointer = _ring.gpu_open(bytes.fromhex(handle))
            buffers.append(DeviceBuffer(pointer, slot_bytes, _freer(_ring.gpu_close, pointer)))
    except RuntimeError as error:
        explain_missing_ipc(error, required=required)
        return None
    return buffers


def explain_missing_ipc(error: RuntimeError, *, required: bool) -> None:
    """Warn that slots go through host memory instead, or raise where they may not."""
    if required:
        raise RuntimeError(
            f"CUDA IPC does not work here ({error}); run both ranks in one container that shares "
            "its PID namespace, or set ring.payload=host"
        ) from error
    log.warning(
        "CUDA IPC does not work here (%s): features go through pinned host memory, which is slower",
        error,
    )


_ALLOCATED: weakref.WeakValueDictionary[int, DeviceBuffer] = weakref.WeakValueDictionary()


def _freer(function: Callable[[int], None], pointer: int) -> Callable[[], None]:
    return lambda: function(pointer)
