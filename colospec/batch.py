"""The nouns that every part speaks: what travels from the plan to the trainer, and how.

Everything is packed: the tokens of several documents lie end to end in one dimension, and
`cu_seqlens` marks the borders. No tensor here has a batch dimension or padding.

Shape letters: T tokens of the micro-batch, B documents in it, A aux layers, H hidden size of the
target.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class Cursor:
    """Name one micro-batch of the plan.

    `micro_batch` counts from the start of the epoch whatever the number of trainers, so
    (epoch, micro_batch) is all that a checkpoint needs; `step` is the optimizer step (from 0) that
    the micro-batch belongs to.
    """

    epoch: int
    micro_batch: int
    step: int

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class TokenBatch:
    """One packed micro-batch of documents, as the plan names it.

    token_ids [T] int64; position_ids [T] int64, restarting at 0 in each document; cu_seqlens
    [B + 1] int32, from 0 to T; loss_mask [T] bool, True where the token is supervised (is a label).
    A micro-batch may be empty: T = 0, B = 0, cu_seqlens = [0].
    """

    cursor: Cursor
    sample_ids: tuple[int, ...]
    token_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    loss_mask: Tensor

    @classmethod
    def pack(
        cls,
        cursor: Cursor,
        sample_ids: Sequence[int],
        token_ids: Sequence[Tensor],
        loss_masks: Sequence[Tensor],
    ) -> TokenBatch:
        """Lay documents end to end: `token_ids[i]` and `loss_masks[i]` are document i, [length]."""
        lengths = [len(ids) for ids in token_ids]
        empty = torch.empty(0, dtype=torch.int64)
        return cls(
            cursor=cursor,
            sample_ids=tuple(sample_ids),
            token_ids=torch.cat([ids.to(torch.int64) for ids in token_ids]) if lengths else empty,
            position_ids=torch.cat([torch.arange(n) for n in lengths]) if lengths else empty,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            loss_mask=torch.cat([mask.to(torch.bool) for mask in loss_masks])
            if lengths
            else empty.to(torch.bool),
        )

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def digest(self) -> int:
        """A 64-bit fingerprint of cursor, sample ids, tokens, borders and mask (on the host).

        Engine and trainer build the micro-batch independently from one plan; the digest rides in
        the ring slot, so that features of one micro-batch can never meet the tokens of another.
        """
        header = repr((self.cursor.epoch, self.cursor.micro_batch, self.sample_ids)).encode()
        tokens = self.token_ids.cpu().numpy().tobytes()
        borders = self.cu_seqlens.cpu().numpy().tobytes()
        mask = self.loss_mask.cpu().numpy().tobytes()
        low = zlib.crc32(mask, zlib.crc32(tokens))
        high = zlib.crc32(borders, zlib.crc32(header))
        return (high << 32) | low

    def to(self, device: torch.device | str) -> TokenBatch:
        """Copy the tensors to `device`."""
        return TokenBatch(
            self.cursor,
            self.sample_ids,
            self.token_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.loss_mask.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class TensorSpec:
    """One row of the tensor table: a feature tensor has shape [T, width]."""

    name: str
    dtype: torch.dtype
    width: int


@dataclass(frozen=True)
class FeatureSpec:
    """What a draft model wants from the target for every token.

    `aux_layer_ids` are 0-based: layer i means the output of decoder layer i, the residual stream
    before any norm.
    """

    aux_layer_ids: tuple[int, ...]
    last_hidden_states: bool
    hidden_size: int
    dtype: torch.dtype

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return the tensor table that both ends of a ring compare."""
        aux = TensorSpec(
            "aux_hidden_states", self.dtype, len(self.aux_layer_ids) * self.hidden_size
        )
        last = TensorSpec("last_hidden_states", self.dtype, self.hidden_size)
        return (aux, last) if self.last_hidden_states else (aux,)

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.width * spec.dtype.itemsize for spec in self.tensors())


@dataclass(frozen=True)
class Features:
    """The target's hidden states for one micro-batch.

    aux_hidden_states [T, A * H]: outputs of the aux layers, concatenated in the order of
    `FeatureSpec.aux_layer_ids`; last_hidden_states [T, H]: after the target's final norm, or None
    where the draft does not ask for it.
    """

    aux_hidden_states: Tensor
    last_hidden_states: Tensor | None

    @classmethod
    def empty(cls, spec: FeatureSpec, num_tokens: int, device: torch.device) -> Features:
        """Allocate what `spec` asks for, for T = `num_tokens` tokens; it holds anything."""
        aux, *last = (
            torch.empty(num_tokens, part.width, dtype=part.dtype, device=device)
            for part in spec.tensors()
        )
        return cls(aux, last[0] if last else None)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what there is, in the order of `FeatureSpec.tensors`."""
        aux, last = self.aux_hidden_states, self.last_hidden_states
        return (aux,) if last is None else (aux, last)

    def to(self, device: torch.device | str) -> Features:
        """Copy the tensors to `device`; those that are there already stay as they are."""
        last = self.last_hidden_states
        return Features(
            self.aux_hidden_states.to(device), None if last is None else last.to(device)
        )


@dataclass(frozen=True)
class FeatureBatch:
    """What a draft model learns from: tokens and the target's features for them."""

    tokens: TokenBatch
    features: Features


class FeatureSink(Protocol):
    """Where an engine writes features.

    Call order, all by the engine: for every micro-batch `acquire`, fill the views, `publish`; after
    the last one `end`; after an exception `fail`; always `close`.
    """

    def acquire(self, tokens: TokenBatch, *, timeout_s: float) -> Features:
        """Wait for a free slot and return its views, to be filled; they stay ours until `publish`.

        Raises `colospec.ring.Closed` when the trainer wants no more.
        """
        ...

    def publish(self) -> None:
        """Hand the acquired slot over, in stream order; the views must not be touched again."""
        ...

    def end(self) -> None:
        """Say that no micro-batch follows."""
        ...

    def fail(self, error: str) -> None:
        """Say that the engine failed; the trainer raises with this text after draining."""
        ...

    def close(self) -> None:
        """Let go of the memory, once the trainer has let go or is dead. Idempotent."""
        ...


class Lease(Protocol):
    """A full slot in the trainer's hands. A context manager: leaving it releases."""

    @property
    def cursor(self) -> Cursor: ...
    @property
    def digest(self) -> int: ...
    @property
    def features(self) -> Features: ...

    def release(self) -> None:
        """Give the slot back, in stream order; the features must not be read again. Idempotent."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class FeatureSource(Protocol):
    """Where a trainer reads features: `acquire` until it returns None, then `close`."""

    def acquire(self, *, timeout_s: float) -> Lease | None:
        """Wait for the oldest full slot; None after the engine's `end`.

        Raises `colospec.ring.PeerFailed` or `PeerDied` once all slots published before are drained.
        """
        ...

    def close(self) -> None:
        """Tell the engine to stop, and let go of the memory. Idempotent."""
        ...
