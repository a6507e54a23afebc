"""What decoding needs of a target: one sequence, and a cache that can shrink."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from colospec.target import Target


class Decoder(Protocol):
    """What decoding needs of the target: one sequence, new tokens appended call by call.

    Shape letters as in `TargetDecoder`.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def num_forwards(self) -> int:
        """How often `forward` was called."""
        ...

    def start(self, aux_layer_ids: tuple[int, ...]) -> None:
        """Forget the last sequence; from now on return these layers' outputs."""
        ...

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append token_ids [n]; return logits [n, V] and aux hidden states [n, A * H]."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


def eos_token_ids(target: Target) -> frozenset[int]:
    """Return the tokens that end a text, from the target's config.json; may be none."""
    ids = target.hf_config.get("eos_token_id")
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
