"""The layout of a slot, and what both sides of a ring must agree on.

T is the number of tokens of the micro-batch in the slot, at most `max_tokens`.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import colospec
from colospec import _ring
from colospec.batch import Cursor, Features, FeatureSpec, TensorSpec, TokenBatch

ALIGNMENT = 256
"""Of a tensor in its slot, in bytes."""

MAX_SLOTS = 1024


@dataclass(frozen=True)
class Row:
    """One tensor of a slot: [T, width] from byte `offset`, a multiple of 256."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class SlotLayout:
    """Where the tensors of a slot lie; every slot has room for `max_tokens` rows of each."""

    rows: tuple[Row, ...]
    max_tokens: int
    slot_bytes: int

    @classmethod
    def plan(cls, spec: FeatureSpec, max_tokens: int) -> SlotLayout:
        """Lay the tensors of `spec` end to end. Raises ValueError where a row would be empty."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1; raise data.token_budget")
        rows, offset = [], 0
        for tensor in spec.tensors():
            if tensor.width < 1:
                raise ValueError(f"{tensor.name} has width {tensor.width}; it must be at least 1")
            rows.append(Row(tensor, offset))
            offset += _aligned(max_tokens * tensor.width * tensor.dtype.itemsize)
        return cls(tuple(rows), max_tokens, offset)

    def label(self, max_sequences: int, ring_id: str) -> bytes:
        """Describe the slots of the ring `ring_id`, for the head of its control block."""
        table = " ".join(
            f"{row.spec.name}:{dtype_name(row.spec.dtype)}[{row.spec.width}]@{row.offset}"
            for row in self.rows
        )
        text = f"{ring_id} {self.max_tokens}/{max_sequences} {self.slot_bytes} {table}"
        return text.encode()

    def slots(self, memory: mmap.mmap, num_slots: int) -> list[Slot]:
        """View `memory` (num_slots * slot_bytes, host) as slots; the views keep it alive."""
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        return [Slot(self, piece) for piece in flat.chunk(num_slots)]


class Slot:
    """The memory of one slot, `slot_bytes` of uint8 on any device, as tensors."""

    def __init__(self, layout: SlotLayout, memory: Tensor) -> None:
        self._memory = memory
        self._tensors: dict[str, Tensor] = {}
        for row in layout.rows:
            shape = (layout.max_tokens, row.spec.width)
            nbytes = shape[0] * shape[1] * row.spec.dtype.itemsize
            rows = memory[row.offset : row.offset + nbytes].view(row.spec.dtype)
            self._tensors[row.spec.name] = rows.view(shape)

    def features(self, num_tokens: int) -> Features:
        """View the first `num_tokens` rows of every tensor."""
        last = self._tensors.get("last_hidden_states")
        return Features(
            self._tensors["aux_hidden_states"][:num_tokens],
            None if last is None else last[:num_tokens],
        )

    def poison(self) -> None:
        """Fill with 0xFF, which is NaN in every floating-point type and -1 in integers."""
        self._memory.fill_(0xFF)


class Note(NamedTuple):
    """What the header of a slot says of its micro-batch; each an unsigned 64-bit integer."""

    epoch: int
    micro_batch: int
    step: int
    digest: int
    num_tokens: int
    num_sequences: int

    @classmethod
    def of(cls, tokens: TokenBatch) -> Note:
        """Describe a micro-batch."""
        epoch, micro_batch, step = (
            tokens.cursor.epoch,
            tokens.cursor.micro_batch,
            tokens.cursor.step,
        )
        return cls(epoch, micro_batch, step, tokens.digest, tokens.num_tokens, tokens.num_sequences)

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self.micro_batch, self.step)

    def to_bytes(self) -> bytes:
        """Write for `_ring.Ring.publish`."""
        return _NOTE.pack(*self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Note:
        """Read what `_ring.Ring.wait` returns."""
        return cls(*_NOTE.unpack(raw))


_NOTE = struct.Struct("=6Q")


@dataclass(frozen=True)
class Agreement:
    """What one side expects of the ring. Both sides' must be equal before step 0."""

    version: str
    tensors: tuple[tuple[str, str, int], ...]
    """Name, dtype and width of each tensor, in order."""
    max_tokens: int
    max_sequences: int
    num_slots: int
    plan_digest: str
    gpu_uuid: str | None
    boot_id: str

    @classmethod
    def of(
        cls, spec: FeatureSpec, *, max_tokens: int, max_sequences: int, num_slots: int,
        plan_digest: str, gpu_uuid: str | None, boot_id: str,
    ) -> Agreement:  # fmt: skip
        """Collect this side's expectation."""
        rows = tuple((row.name, dtype_name(row.dtype), row.width) for row in spec.tensors())
        return cls(
            colospec.__version__, rows, max_tokens, max_sequences, num_slots, plan_digest, gpu_uuid,
            boot_id,
        )  # fmt: skip

    def differences(self, other: Agreement) -> list[str]:
        """Return the names of the fields in which the two differ."""
        return [name for name in vars(self) if getattr(self, name) != getattr(other, name)]

    def __str__(self) -> str:
        table = ", ".join(f"{name} {dtype}[T, {width}]" for name, dtype, width in self.tensors)
        return (
            f"{table}; max_tokens {self.max_tokens}, max_sequences {self.max_sequences}, "
            f"num_slots {self.num_slots}; plan {self.plan_digest}; GPU {self.gpu_uuid or 'none'}; "
            f"boot {self.boot_id}; colospec {self.version}"
        )


def check_size(tokens: TokenBatch, max_tokens: int, max_sequences: int) -> None:
    """Raise ValueError for a micro-batch that fits no slot."""
    for name, value, limit, setting in (
        ("tokens", tokens.num_tokens, max_tokens, "token_budget"),
        ("sequences", tokens.num_sequences, max_sequences, "max_sequences"),
    ):
        if value > limit:
            raise ValueError(
                f"{tokens.cursor} has {value} {name}, but a slot holds {limit}; "
                f"set data.{setting}={value}"
            )


def control_bytes(num_slots: int) -> int:
    """Return the size of a control block. Raises ValueError for a number that no ring has."""
    if not 1 <= num_slots <= MAX_SLOTS:
        raise ValueError(f"ring.num_slots={num_slots} must be in [1, {MAX_SLOTS}]")
    return _ring.CONTROL_BYTES + num_slots * _ring.HEADER_BYTES


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
