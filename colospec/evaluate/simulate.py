"""Acceptance length estimated from accuracy, without speculative decoding: always say *simulated*.

A draft is asked for K tokens from every place where a chain could start, with the true tokens fed
at each step whatever it predicted (teacher forcing, as in training). `accuracies[k]` is the share
of places whose k-th prediction is right. The estimate multiplies these shares as if being right at
one step said nothing about the next.

Relation to the real number, which `colospec.evaluate.acceptance` measures: a greedy chain accepts
k tokens where its first k predictions are all right, and up to the first wrong one its own tokens
are the true ones. So `1 + mean(sum of cumulative products of right)` over all places, called
`joint_acceptance_length` here, is exactly the mean of 1 + accepted tokens over chains started at
every place. It differs from the real one in the weight of the places alone (decoding jumps over
those it accepted), and from the simulated one by the correlation between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from colospec.evaluate.drafters import Drafter


def simulated_acceptance_length(accuracies: Sequence[float]) -> float:
    """Return 1 + a0 + a0 a1 + a0 a1 a2 + ...; the 1 is the bonus token of each verify step."""
    length, product = 1.0, 1.0
    for accuracy in accuracies:
        product *= accuracy
        length += product
    return length


@dataclass(frozen=True)
class Simulation:
    """Teacher-forced accuracy on `num_places` places; `accuracies` has one entry per chain step."""

    num_places: int
    accuracies: list[float]
    joint_acceptance_length: float

    @property
    def simulated_acceptance_length(self) -> float:
        """The estimate that training logs show."""
        return simulated_acceptance_length(self.accuracies)


def simulate(
    drafter: Drafter, texts: Sequence[tuple[Tensor, Tensor, int]], *, chain_length: int
) -> Simulation:
    """Measure `drafter` on continuations that the target wrote itself, greedily.

    Each of `texts` is (token_ids [N], the target's aux hidden states [N, A * H], number of prompt
    tokens). A chain of `chain_length` (K) tokens starts behind every token of the continuation
    that has K more tokens after it. Raises ValueError where no text is long enough.
    """
    right = [0] * chain_length
    joint = 0
    num_places = 0
    for token_ids, aux, num_prompt_tokens in texts:
        first, last = num_prompt_tokens + 1, len(token_ids) - chain_length
        if last < first:
            continue
        predicted = drafter.predict(token_ids, aux, first=first, num_tokens=chain_length)
        # Row i: the chain that starts behind token first + i - 1.
        hits = predicted == token_ids[first:].unfold(0, chain_length, 1)
        num_places += len(hits)
        right = [a + b for a, b in zip(right, hits.sum(0).tolist(), strict=True)]
        joint += int(hits.long().cumprod(1).sum())
    if not num_places:
        raise ValueError(
            f"no continuation is longer than chain_length={chain_length} tokens; "
            "use more prompts or a larger max_new_tokens"
        )
    return Simulation(num_places, [hits / num_places for hits in right], 1.0 + joint / num_places)
