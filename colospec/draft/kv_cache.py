"""Keys and values of one sequence, for decoding.

Shape letters: N query heads, M key-value heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Rotated keys and values of one sequence, for decoding: grows by appending, shrinks by
    `truncate`."""

    def __init__(self) -> None:
        self.length = 0
        self._states: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add n tokens [n, M, head_dim] and return views of all, [length, M, head_dim]."""
        end = self.length + len(key)
        if self._states is None or end > self._states.shape[1]:
            grown = key.new_empty(2, max(64, 2 * end), *key.shape[1:])
            if self._states is not None:
                grown[:, : self.length] = self._states[:, : self.length]
            self._states = grown
        self._states[0, self.length : end] = key
        self._states[1, self.length : end] = value
        self.length = end
        return self._states[0, :end], self._states[1, :end]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append the new tokens and attend causally over everything cached."""
        keys, values = self.append(key, value)
        mask = torch.ones(len(query), self.length, dtype=torch.bool, device=query.device)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask.tril(self.length - len(query)),
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
