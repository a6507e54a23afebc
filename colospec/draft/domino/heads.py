"""What reads the tokens of a block one by one: a GRU without biases, by its public tensor names.

torch's own GRU keeps references to its weights, which FSDP2 exchanges under it.

Shape letters: I input width, G state width, N sequences of b tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrefixGru(nn.Module):
    """One layer, in the arithmetic of torch.nn.GRU: gates in the order reset, update, new."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        for weight in (self.weight_ih_l0, self.weight_hh_l0):
            nn.init.uniform_(weight, -(hidden_size**-0.5), hidden_size**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the state after each token, [N, b, G], of inputs [N, b, I]."""
        state = inputs.new_zeros(len(inputs), self.hidden_size)
        found = []
        for projected in F.linear(inputs, self.weight_ih_l0).unbind(1):
            state = self._next(projected, state)
            found.append(state)
        return torch.stack(found, dim=1)

    def step(self, inputs: Tensor, state: Tensor) -> Tensor:
        """Return the state [n, G] after one more token [n, I]."""
        return self._next(F.linear(inputs, self.weight_ih_l0), state)

    def _next(self, projected: Tensor, state: Tensor) -> Tensor:
        left = projected.chunk(3, dim=-1)
        right = F.linear(state, self.weight_hh_l0).chunk(3, dim=-1)
        reset, update = (torch.sigmoid(left[gate] + right[gate]) for gate in (0, 1))
        new = torch.tanh(left[2] + reset * right[2])
        return torch.lerp(new, state, update)
