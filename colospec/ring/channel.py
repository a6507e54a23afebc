"""The ring between two processes of one host: `Writer` for the engine, `Reader` for its trainer.

Both constructors meet in the job's store and return only once both sides have agreed and share the
memory. The engine owns it: K slots of features and one control block.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
from dataclasses import replace
from typing import Literal

import torch

from colospec import _ring
from colospec.batch import Features, FeatureSpec, TokenBatch
from colospec.ring.device import (
    DeviceBuffer,
    PinnedMapping,
    Streams,
    allocate,
    explain_missing_ipc,
    export,
    gpu_uuid,
    open_exported,
    own_buffers,
    use_device,
)
from colospec.ring.errors import Corrupt, RingState, shorten
from colospec.ring.handshake import (
    Offer,
    Store,
    compare,
    key,
    raise_refusal,
    raise_stale,
    receive,
)
from colospec.ring.lease import LeaseBook, SlotLease
from colospec.ring.link import Link
from colospec.ring.memory import Process, SharedFile, boot_id, map_foreign
from colospec.ring.spec import Agreement, Note, Slot, SlotLayout, check_size, control_bytes

Payload = Literal["auto", "ipc", "host"]
CPU = torch.device("cpu")
log = logging.getLogger(__name__)


class Writer:
    """The engine's side: implements `batch.FeatureSink`.

    On a CUDA `device` the slots lie in its memory (`payload` "ipc"), or in pinned host memory
    ("host"; "auto" where CUDA IPC does not work); `publish` follows the current stream's work and
    never waits for it.

    Raises SpecMismatch if the trainer was started with other settings, PeerFailed if it could not
    attach, RingTimeout if it did not come within `timeout_s`, which also bounds `close`, and
    MemoryError if the slots do not fit into the GPU.
    `acquire` and `publish` can raise Closed, PeerDied, Corrupt and RingTimeout (see colospec.ring).
    """

    def __init__(
        self,
        store: Store,
        pair: str,
        spec: FeatureSpec,
        *,
        max_tokens: int,
        max_sequences: int,
        num_slots: int,
        plan_digest: str,
        timeout_s: float,
        device: torch.device = CPU,
        payload: Payload = "auto",
    ) -> None:
        self._limits = (max_tokens, max_sequences)
        self._timeout_s = timeout_s
        self._device = device
        self._filling: TokenBatch | None = None
        self._has_ended = False
        layout, agreement = _terms(
            spec, device, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
            plan_digest=plan_digest,
        )  # fmt: skip
        ring_id = secrets.token_hex(8)
        buffers, handles = _allocate(device, payload, num_slots, layout.slot_bytes)
        # Attached or not, the files are closed: mappings do not need them. The control block goes
        # first (see _attach).
        with (
            SharedFile("colospec-payload", num_slots * layout.slot_bytes) as payload_file,
            SharedFile("colospec-control", control_bytes(num_slots)) as control,
        ):
            label = layout.label(max_sequences, ring_id)
            block = control.map()
            ring = _ring.Ring(block, True, num_slots, 0, label)
            offer = Offer(
                Process.current(), agreement, ring_id, control.fd, payload_file.fd, handles,
                tuple(buffer.pointer for buffer in buffers),
            )  # fmt: skip
            try:
                pidfd, uses_ipc = _meet(store, pair, offer, timeout_s)
            except BaseException as error:
                # For a trainer that attaches in this very moment.
                text = f"the engine gave up at the handshake: {type(error).__name__}: {error}"
                ring.leave(_ring.ERROR, shorten(text, _ring.TEXT_BYTES))
                raise
            host = None if uses_ipc else payload_file.map()
        try:
            slots = _slots(layout, num_slots, device, buffers if uses_ipc else None, host)
            streams = Streams(ring, block, device) if device.type == "cuda" else None
        except BaseException as error:
            text = f"the engine could not use the ring: {type(error).__name__}: {error}"
            ring.leave(_ring.ERROR, shorten(text, _ring.TEXT_BYTES))
            _KEPT.append(buffers)
            os.close(pidfd)
            raise
        self._link = Link(ring, slots, pair=pair, peer="trainer", pidfd=pidfd, streams=streams)

    def acquire(self, tokens: TokenBatch, *, timeout_s: float) -> Features:
        """Wait for a free slot; return its views [T, width], to be filled before `publish`."""
        self._link.require_open()
        if self._filling is not None:
            raise RuntimeError(
                f"acquire of {tokens.cursor}: {self._filling.cursor} is not yet published"
            )
        if self._has_ended:
            raise RuntimeError(f"acquire of {tokens.cursor} after end or fail")
        check_size(tokens, *self._limits)
        taken = self._link.acquire(timeout_s)
        assert taken is not None, "END is the engine's own word"
        self._filling = tokens
        return self._link.slots[taken[0]].features(tokens.num_tokens)

    def publish(self) -> None:
        """Hand the acquired slot over; its views must not be touched again."""
        if self._filling is None:
            raise RuntimeError("publish without acquire")
        tokens, self._filling = self._filling, None
        if self._has_ended:
            raise RuntimeError(f"publish of {tokens.cursor} after fail")
        self._link.publish(Note.of(tokens).to_bytes())

    def end(self) -> None:
        """Say that no micro-batch follows those published. Without effect after `fail`."""
        self._link.require_open()
        if self._filling is not None and not self._has_ended:
            raise RuntimeError(f"end: {self._filling.cursor} is not yet published")
        self._leave(_ring.END, b"")

    def fail(self, error: str) -> None:
        """Leave `error` to the trainer, which raises it after the slots published before.

        Without effect after `end`, `close` or an earlier `fail`. A text of more than about 4 kB
        keeps its beginning and its end.
        """
        self._leave(_ring.ERROR, shorten(error, _ring.TEXT_BYTES))

    def close(self) -> None:
        """Let go of the memory once the trainer has let go or is dead. Idempotent.

        A ring closed without `end` or `fail` is an error for the trainer. A trainer that does not
        close within `timeout_s` costs a warning, and keeps the memory.
        """
        if not self._link.is_open:
            return
        self._leave(_ring.ERROR, b"the engine closed the ring before the end of its work")
        status = _ring.AGAIN
        try:
            status, _, detail = self._link.wait(self._timeout_s)
            if status == _ring.CORRUPT:
                log.warning("%s", self._link.corrupt(detail.decode()))
            elif status == _ring.AGAIN:
                log.warning(
                    "the trainer did not let go of the ring within %g s [%s]",
                    self._timeout_s, self._link.state(),
                )  # fmt: skip
        finally:
            if self._device.type == "cuda" and status not in (_ring.CLOSED, _ring.DEAD):
                _KEPT.append(self._link.slots)
            self._link.close()

    def stats(self) -> RingState:
        """Look at both sides: slots filled, phases, seconds waited for the other side."""
        return self._link.state()

    def _leave(self, kind: int, text: bytes) -> None:
        if not self._has_ended:
            self._link.ring.leave(kind, text)
            self._has_ended = True


class Reader:
    """The trainer's side: implements `batch.FeatureSource`.

    `lease` "view" hands out tensors that lie in the slot; "copy" clones them and frees the slot at
    once. Several leases may be held, and released in any order (on a GPU all in one stream); the
    engine gets slots back in theirs. `poison` fills released slots with NaN, to find readers of
    released leases. Slots in pinned host memory are always copied out: reading them again and again
    over PCIe would be slower. Raises as `Writer` does, and PeerDied if the engine is gone already.
    """

    def __init__(
        self,
        store: Store,
        pair: str,
        spec: FeatureSpec,
        *,
        max_tokens: int,
        max_sequences: int,
        num_slots: int,
        plan_digest: str,
        timeout_s: float,
        lease: Literal["view", "copy"] = "view",
        poison: bool = False,
        device: torch.device = CPU,
        payload: Payload = "auto",
    ) -> None:
        self._limits = (max_tokens, max_sequences)
        layout, agreement = _terms(
            spec, device, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
            plan_digest=plan_digest,
        )  # fmt: skip
        reply, link = Offer(Process.current(), agreement), None
        try:
            offer = receive(store, pair, "engine", timeout_s=timeout_s)
            reply = replace(reply, ring_id=offer.ring_id)
            compare(pair, engine=offer.agreement, trainer=agreement)
            link, uses_ipc = _attach(
                offer, pair, layout, num_slots, max_sequences, device, required=payload == "ipc"
            )
            reply = replace(reply, uses_ipc=uses_ipc)
            store.set(key(pair, "trainer"), reply.to_bytes())
        except BaseException as error:
            if link is not None:
                link.close()
            # Also a refusal is answered, so that the engine need not wait for its deadline.
            refusal = replace(reply, error=f"{type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                store.set(key(pair, "trainer"), refusal.to_bytes())
            raise
        self._link = link
        copies = lease == "copy" or (device.type == "cuda" and not uses_ipc)
        self._book = LeaseBook(copies=copies, poison=poison, release=link.release)

    def acquire(self, *, timeout_s: float) -> SlotLease | None:
        """Wait for the oldest full slot; None after the engine's `end`."""
        taken = self._link.acquire(timeout_s, self._book.num_held)
        if taken is None:
            return None
        slot, note = self._link.slots[taken[0]], Note.from_bytes(taken[1])
        if note.num_tokens > self._limits[0] or note.num_sequences > self._limits[1]:
            raise self._link.corrupt("number of tokens or sequences in a slot header")
        return self._book.lease(note.cursor, note.digest, slot, note.num_tokens)

    def close(self) -> None:
        """Tell the engine to stop, release all leases, and let go of the memory. Idempotent."""
        if not self._link.is_open:
            return
        self._link.require_open()
        try:
            self._book.release_all()
            # Before the engine may free what is mapped here.
            self._link.detach()
        finally:
            self._link.ring.leave(_ring.CLOSED, b"")
            self._link.close()

    def stats(self) -> RingState:
        """Look at both sides: slots filled, phases, seconds waited for the other side."""
        return self._link.state()

    @property
    def fill(self) -> int:
        """Slots published and not yet released, those under lease among them."""
        return self.stats().filled


_KEPT: list[list[Slot] | list[DeviceBuffer]] = []
"""GPU memory that a trainer may still have mapped; the process's end frees it."""


def _terms(
    spec: FeatureSpec,
    device: torch.device,
    *,
    max_tokens: int,
    max_sequences: int,
    num_slots: int,
    plan_digest: str,
) -> tuple[SlotLayout, Agreement]:
    """Return the layout of the slots, and what the other side must expect as well."""
    agreement = Agreement.of(
        spec, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
        plan_digest=plan_digest, gpu_uuid=gpu_uuid(device), boot_id=boot_id(),
    )  # fmt: skip
    return SlotLayout.plan(spec, max_tokens), agreement


def _allocate(
    device: torch.device, payload: Payload, num_slots: int, slot_bytes: int
) -> tuple[list[DeviceBuffer], tuple[str, ...]]:
    """Return the engine's slots in GPU memory and their handles; none for host memory."""
    if device.type != "cuda":
        return [], ()
    use_device(device)
    if payload == "host":
        return [], ()
    buffers = allocate(num_slots, slot_bytes)
    handles = export(buffers, required=payload == "ipc")
    return (buffers, handles) if handles else ([], ())


def _slots(
    layout: SlotLayout,
    num_slots: int,
    device: torch.device,
    buffers: list[DeviceBuffer] | None,
    host: mmap.mmap | None,
) -> list[Slot]:
    """View the slots where they lie: in GPU memory, or in a file that a GPU may see too."""
    if buffers is not None:
        return [Slot(layout, buffer.tensor(device)) for buffer in buffers]
    assert host is not None
    if device.type != "cuda":
        return layout.slots(host, num_slots)
    return [Slot(layout, piece) for piece in PinnedMapping(host).slots(num_slots, device)]


def _meet(store: Store, pair: str, offer: Offer, timeout_s: float) -> tuple[int, bool]:
    """Offer the ring; return the pidfd of the trainer that has attached, and if by CUDA IPC."""
    store.set(key(pair, "engine"), offer.to_bytes())
    reply = receive(store, pair, "trainer", timeout_s=timeout_s)
    raise_stale(pair, offer, reply)
    compare(pair, engine=offer.agreement, trainer=reply.agreement)
    raise_refusal(pair, reply)
    return reply.process.watch(), reply.uses_ipc


def _attach(
    offer: Offer,
    pair: str,
    layout: SlotLayout,
    num_slots: int,
    max_sequences: int,
    device: torch.device,
    *,
    required: bool,
) -> tuple[Link, bool]:
    """Map the engine's memory; also return whether by CUDA IPC (which may be `required`)."""
    pidfd = offer.process.watch()
    try:
        buffers = _open_buffers(offer, layout, num_slots, device, required=required)
        # The control block comes last: its engine withdraws it first, and it holds the ring's id,
        # so that while it is there both file descriptors still mean what the offer says.
        host = None
        if buffers is None:
            nbytes = num_slots * layout.slot_bytes
            host = map_foreign(offer.process, pidfd, offer.payload_fd, nbytes)
        control = map_foreign(offer.process, pidfd, offer.control_fd, control_bytes(num_slots))
        label = layout.label(max_sequences, offer.ring_id)
        try:
            ring = _ring.Ring(control, False, num_slots, 0, label)
        except ValueError as error:
            raise Corrupt(str(error)) from None
        slots = _slots(layout, num_slots, device, buffers, host)
        streams = Streams(ring, control, device) if device.type == "cuda" else None
        link = Link(ring, slots, pair=pair, peer="engine", pidfd=pidfd, streams=streams)
        return link, buffers is not None
    except BaseException:
        os.close(pidfd)
        raise


def _open_buffers(
    offer: Offer, layout: SlotLayout, num_slots: int, device: torch.device, *, required: bool
) -> list[DeviceBuffer] | None:
    """Map the engine's slots in GPU memory; None if it has none, or CUDA IPC does not work."""
    if device.type != "cuda":
        return None
    use_device(device)
    if not offer.handles:
        if required:
            explain_missing_ipc(RuntimeError("the engine could not export"), required=True)
        return None
    if len(offer.handles) != num_slots or len(offer.pointers) != num_slots:
        raise Corrupt(f"the engine offers {len(offer.handles)} slots, expected {num_slots}")
    if offer.process == Process.current():
        return own_buffers(offer.pointers)
    return open_exported(offer.handles, layout.slot_bytes, required=required)
