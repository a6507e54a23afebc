"""The target as a decoder, made of an engine's captures and the target's frozen head.

Nothing is kept between calls: each runs the whole text so far through the engine. That is
quadratic, but needs no second copy of the target, and a few short texts cost little.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colospec.batch import Features
from colospec.evaluate.decoder import eos_token_ids
from colospec.target import Target


class CapturedDecoder:
    """Implements `decoder.Decoder`.

    `capture` returns the features of one text [N] of token ids, on the CPU, last hidden states
    included; they and `head` [V, H], whose products are the logits, are on `device`.
    `aux_layer_ids` are the layers it captures.
    """

    def __init__(
        self,
        capture: Callable[[Tensor], Features],
        head: Tensor,
        *,
        target: Target,
        aux_layer_ids: tuple[int, ...],
    ) -> None:
        self.device = head.device
        self.eos_token_ids = eos_token_ids(target)
        self.num_forwards = 0
        self._capture = capture
        self._head = head
        self._aux_layer_ids = aux_layer_ids
        self._known = torch.empty(0, dtype=torch.int64)

    def start(self, aux_layer_ids: tuple[int, ...]) -> None:
        """Forget the last sequence. The layers are those that the engine captures."""
        assert aux_layer_ids == self._aux_layer_ids
        self._known = self._known[:0]

    @torch.inference_mode()
    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append token_ids [n]; return logits [n, V] and aux hidden states [n, A * H]."""
        self.num_forwards += 1
        self._known = torch.cat([self._known, token_ids.to("cpu")])
        features = self._capture(self._known)
        last = features.last_hidden_states
        assert last is not None
        rows = slice(len(self._known) - len(token_ids), None)
        return last[rows].to(self._head.dtype) @ self._head.T, features.aux_hidden_states[rows]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._known = self._known[:length]
