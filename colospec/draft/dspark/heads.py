"""The small heads of DSpark: a correction of the logits by the token before, and a confidence.

Tensors have the names of public checkpoints.

Shape letters: H hidden size, R rank, V vocabulary, N blocks of b slots, P supervised slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colospec.draft.dspark.config import MarkovHeadType
from colospec.draft.layer import init_linears


class MarkovHead(nn.Module):
    """Low-rank logits that a slot's token adds because of the token before it."""

    def __init__(self, kind: MarkovHeadType, *, vocab_size: int, hidden_size: int, rank: int):
        super().__init__()
        self.kind, self.rank = kind, rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)
        if kind is MarkovHeadType.gated:
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        if kind is MarkovHeadType.rnn:
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        init_linears(self)

    def step(self, embeds: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `markov_w2` turns into logits [n, R], and the next state [n, R].

        embeds [n, R]: of the tokens before, by `markov_w1`; hidden [n, H]: normed states of the
        slots; state: of the slots before, zero for the first.
        """
        if self.kind is MarkovHeadType.vanilla:
            return embeds, state
        if self.kind is MarkovHeadType.gated:
            gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embeds], dim=-1)))
            return gate * embeds, state
        joint = self.joint_proj(torch.cat([state, embeds, hidden], dim=-1))
        gate, candidate, out = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(out), gate * state + (1 - gate) * torch.tanh(candidate)

    def unroll(self, embeds: Tensor, hidden: Tensor, *, size: int) -> Tensor:
        """Return `step` of all slots of whole blocks, [N * b, R], b = `size`."""
        if self.kind is not MarkovHeadType.rnn:
            return self.step(embeds, hidden, embeds)[0]
        pairs = zip(
            embeds.view(-1, size, self.rank).unbind(1),
            hidden.view(len(embeds) // size, size, hidden.shape[1]).unbind(1),
            strict=True,
        )
        state = embeds.new_zeros(len(embeds) // size, self.rank)
        found = []
        for embed, slot in pairs:
            latent, state = self.step(embed, slot, state)
            found.append(latent)
        return torch.stack(found, dim=1).flatten(0, 1)


class ConfidenceHead(nn.Module):
    """How likely a token is to be accepted, in float32 as engines compute it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)
        init_linears(self)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [n] of the odds, of features [n, width]."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        weight, bias = self.proj.weight.to(dtype), self.proj.bias.to(dtype)
        return F.linear(features.to(dtype), weight, bias).squeeze(1)
