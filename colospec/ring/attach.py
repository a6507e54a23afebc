"""How a ring begins: each side comes with its terms, and leaves with a `Link`, or an error.

The engine makes the memory and offers it in the job's store; the trainer maps it and answers. On a
GPU that memory may outlive the ring (see `keep`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from dataclasses import dataclass, replace
from typing import Literal

import torch

from colospec import _ring
from colospec.batch import FeatureSpec
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
from colospec.ring.errors import Corrupt, shorten
from colospec.ring.handshake import (
    Offer,
    Store,
    compare,
    key,
    raise_refusal,
    raise_stale,
    receive,
)
from colospec.ring.link import Link
from colospec.ring.memory import Process, SharedFile, boot_id, map_foreign
from colospec.ring.spec import Agreement, Slot, SlotLayout, control_bytes

Payload = Literal["auto", "ipc", "host"]


@dataclass(frozen=True)
class Terms:
    """What one side wants of the ring: the layout of its slots, what the other side must expect as
    well, and the device on which this side uses them."""

    layout: SlotLayout
    agreement: Agreement
    device: torch.device

    @classmethod
    def of(
        cls, spec: FeatureSpec, device: torch.device, *, max_tokens: int, max_sequences: int,
        num_slots: int, plan_digest: str,
    ) -> Terms:  # fmt: skip
        """Collect them on this machine. Raises ValueError for a size that no slot has."""
        agreement = Agreement.of(
            spec, max_tokens=max_tokens, max_sequences=max_sequences, num_slots=num_slots,
            plan_digest=plan_digest, gpu_uuid=gpu_uuid(device), boot_id=boot_id(),
        )  # fmt: skip
        return cls(SlotLayout.plan(spec, max_tokens), agreement, device)

    @property
    def num_slots(self) -> int:
        return self.agreement.num_slots

    @property
    def payload_bytes(self) -> int:
        """Size of all slots."""
        return self.num_slots * self.layout.slot_bytes

    @property
    def control_bytes(self) -> int:
        """Size of the control block. Raises ValueError for a number of slots that no ring has."""
        return control_bytes(self.num_slots)

    def label(self, ring_id: str) -> bytes:
        """Describe the slots of the ring `ring_id`, for the head of its control block."""
        return self.layout.label(self.agreement.max_sequences, ring_id)


def offer_ring(store: Store, pair: str, terms: Terms, payload: Payload, timeout_s: float) -> Link:
    """Make a ring and wait for its trainer: the engine's half. Raises as `channel.Writer` does."""
    device = terms.device
    ring_id = secrets.token_hex(8)
    buffers, handles = _allocate(terms, payload)
    # Attached or not, the files are closed: mappings do not need them. The control block goes
    # first (see _attach).
    with (
        SharedFile("colospec-payload", terms.payload_bytes) as payload_file,
        SharedFile("colospec-control", terms.control_bytes) as control,
    ):
        label = terms.label(ring_id)
        block = control.map()
        ring = _ring.Ring(block, True, terms.num_slots, 0, label)
        offer = Offer(
            Process.current(), terms.agreement, ring_id, control.fd, payload_file.fd, handles,
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
        slots = _slots(terms, buffers if uses_ipc else None, host)
        streams = Streams(ring, block, device) if device.type == "cuda" else None
    except BaseException as error:
        text = f"the engine could not use the ring: {type(error).__name__}: {error}"
        ring.leave(_ring.ERROR, shorten(text, _ring.TEXT_BYTES))
        keep(buffers)
        os.close(pidfd)
        raise
    return Link(ring, slots, pair=pair, peer="trainer", pidfd=pidfd, streams=streams)


def join_ring(
    store: Store, pair: str, terms: Terms, payload: Payload, timeout_s: float
) -> tuple[Link, bool]:
    """Wait for the engine's ring and map it: the trainer's half. Also return whether its slots lie
    in GPU memory that both map (CUDA IPC). Raises as `channel.Reader` does."""
    reply, link = Offer(Process.current(), terms.agreement), None
    try:
        offer = receive(store, pair, "engine", timeout_s=timeout_s)
        reply = replace(reply, ring_id=offer.ring_id)
        compare(pair, engine=offer.agreement, trainer=terms.agreement)
        link, uses_ipc = _attach(offer, pair, terms, required=payload == "ipc")
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
    return link, uses_ipc


_KEPT: list[list[Slot] | list[DeviceBuffer]] = []


def keep(memory: list[Slot] | list[DeviceBuffer]) -> None:
    """Hold GPU memory that a trainer may still have mapped; the process's end frees it."""
    _KEPT.append(memory)


def _allocate(terms: Terms, payload: Payload) -> tuple[list[DeviceBuffer], tuple[str, ...]]:
    """Return the engine's slots in GPU memory and their handles; none for host memory."""
    if terms.device.type != "cuda":
        return [], ()
    use_device(terms.device)
    if payload == "host":
        return [], ()
    buffers = allocate(terms.num_slots, terms.layout.slot_bytes)
    handles = export(buffers, required=payload == "ipc")
    return (buffers, handles) if handles else ([], ())


def _slots(terms: Terms, buffers: list[DeviceBuffer] | None, host: mmap.mmap | None) -> list[Slot]:
    """View the slots where they lie: in GPU memory, or in a file that a GPU may see too."""
    layout, device = terms.layout, terms.device
    if buffers is not None:
        return [Slot(layout, buffer.tensor(device)) for buffer in buffers]
    assert host is not None
    if device.type != "cuda":
        return layout.slots(host, terms.num_slots)
    return [Slot(layout, piece) for piece in PinnedMapping(host).slots(terms.num_slots, device)]


def _meet(store: Store, pair: str, offer: Offer, timeout_s: float) -> tuple[int, bool]:
    """Offer the ring; return the pidfd of the trainer that has attached, and if by CUDA IPC."""
    store.set(key(pair, "engine"), offer.to_bytes())
    reply = receive(store, pair, "trainer", timeout_s=timeout_s)
    raise_stale(pair, offer, reply)
    compare(pair, engine=offer.agreement, trainer=reply.agreement)
    raise_refusal(pair, reply)
    return reply.process.watch(), reply.uses_ipc


def _attach(offer: Offer, pair: str, terms: Terms, *, required: bool) -> tuple[Link, bool]:
    """Map the engine's memory; also return whether by CUDA IPC (which may be `required`)."""
    device = terms.device
    pidfd = offer.process.watch()
    try:
        buffers = _open_buffers(offer, terms, required=required)
        # The control block comes last: its engine withdraws it first, and it holds the ring's id,
        # so that while it is there both file descriptors still mean what the offer says.
        host = None
        if buffers is None:
            host = map_foreign(offer.process, pidfd, offer.payload_fd, terms.payload_bytes)
        control = map_foreign(offer.process, pidfd, offer.control_fd, terms.control_bytes)
        label = terms.label(offer.ring_id)
        try:
            ring = _ring.Ring(control, False, terms.num_slots, 0, label)
        except ValueError as error:
            raise Corrupt(str(error)) from None
        slots = _slots(terms, buffers, host)
        streams = Streams(ring, control, device) if device.type == "cuda" else None
        link = Link(ring, slots, pair=pair, peer="engine", pidfd=pidfd, streams=streams)
        return link, buffers is not None
    except BaseException:
        os.close(pidfd)
        raise


def _open_buffers(offer: Offer, terms: Terms, *, required: bool) -> list[DeviceBuffer] | None:
    """Map the engine's slots in GPU memory; None if it has none, or CUDA IPC does not work."""
    if terms.device.type != "cuda":
        return None
    use_device(terms.device)
    if not offer.handles:
        if required:
            explain_missing_ipc(RuntimeError("the engine could not export"), required=True)
        return None
    num_slots = terms.num_slots
    if len(offer.handles) != num_slots or len(offer.pointers) != num_slots:
        raise Corrupt(f"the engine offers {len(offer.handles)} slots, expected {num_slots}")
    if offer.process == Process.current():
        return own_buffers(offer.pointers)
    return open_exported(offer.handles, terms.layout.slot_bytes, required=required)
