"""Greedy choice, sampling, and the two ways to verify a proposal.

Rejection sampling for speculative decoding (arXiv 2211.17192, 2302.01318): a token x drawn from q
is kept with probability min(1, p(x) / q(x)); the first one that is not kept is replaced by a draw
from max(p - q, 0), scaled to one. The tokens so made follow p exactly, whatever q is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Sampler:
    """Chooses tokens from logits: the largest at temperature 0, else a seeded random draw.

    Greedy decoding is sampling from a distribution with all its mass on the largest logit, so one
    code serves both.
    """

    def __init__(self, temperature: float, *, seed: int, device: torch.device) -> None:
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature} must be at least 0 (0 is greedy)")
        self.temperature = temperature
        self._generator = torch.Generator(device).manual_seed(seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the float64 distributions [n, V] of logits [n, V]."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return torch.softmax(logits.double() / self.temperature, dim=-1)

    def draw(self, probabilities: Tensor) -> Tensor:
        """Return one token per row of [n, V], [n] int64."""
        if self.temperature == 0:
            return probabilities.argmax(-1)
        return torch.multinomial(probabilities, 1, generator=self._generator).squeeze(1)

    def verify(self, proposed: Tensor, draft: Tensor, target: Tensor) -> tuple[int, Tensor]:
        """Return how many of the proposed tokens are kept, and the token that follows them, [1].

        proposed [K]; draft [K, V]: what they were drawn from; target [K + 1, V]: the target's
        distributions at those places and after the last one.
        """
        index = proposed.unsqueeze(1)
        p = target[:-1].gather(1, index).squeeze(1)
        q = draft.gather(1, index).squeeze(1)
        if self.temperature == 0:
            kept = p > 0
        else:
            uniform = torch.rand(len(p), dtype=p.dtype, device=p.device, generator=self._generator)
            kept = uniform * q < p
        num_kept = int(kept.long().cumprod(0).sum())
        rest = target[num_kept]
        if num_kept < len(proposed):
            rest = (rest - draft[num_kept]).clamp(min=0)
            # Only rounding can reject a token where p and q agree everywhere.
            rest = rest if rest.sum() > 0 else target[num_kept]
        return num_kept, self.draw(rest[None])
