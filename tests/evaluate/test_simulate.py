"""The simulated acceptance length, and how it relates to the real one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colospec.evaluate.drafters import BigramDrafter, most_frequent_successors
from colospec.evaluate.sampling import Sampler
from colospec.evaluate.simulate import simulate, simulated_acceptance_length
from tests.evaluate.models import CPU, Untrained, greedy_texts


@given(st.lists(st.floats(0, 1), max_size=8))
def test_simulated_acceptance_length_sums_cumulative_products(accuracies: list[float]) -> None:
    expected = 1.0
    for end in range(1, len(accuracies) + 1):
        expected += torch.tensor(accuracies[:end], dtype=torch.float64).prod().item()

    assert simulated_acceptance_length(accuracies) == pytest.approx(expected)


def test_joint_length_is_that_of_chains_started_at_every_place(untrained: Untrained) -> None:
    """Drafting for real from every place gives the joint length exactly."""
    drafter, chain_length = untrained.drafter, 3
    texts = greedy_texts(untrained, num_prompts=3, num_tokens=20)
    lengths = []
    for token_ids, aux, num_prompt in texts:
        for start in range(num_prompt + 1, len(token_ids) - chain_length + 1):
            drafter.start()
            proposal = drafter.propose(
                token_ids[:start],
                aux[: start - 1],
                num_tokens=chain_length,
                sampler=Sampler(0.0, seed=0, device=CPU),
            )
            right = proposal.token_ids == token_ids[start : start + chain_length]
            lengths.append(1 + int(right.long().cumprod(0).sum()))

    simulation = simulate(drafter, texts, chain_length=chain_length)

    assert simulation.num_places == len(lengths)
    assert simulation.joint_acceptance_length == pytest.approx(sum(lengths) / len(lengths))


def test_bigram_accuracy_is_the_same_at_every_step_but_for_the_border(random_seed: int) -> None:
    generator = torch.Generator().manual_seed(random_seed)
    token_ids = torch.randint(4, (400,), generator=generator)
    table = torch.randint(4, (4,), generator=generator)

    simulation = simulate(
        BigramDrafter(table), [(token_ids, torch.empty(400, 0), 1)], chain_length=3
    )

    right = (table[token_ids[1:-1]] == token_ids[2:]).double()
    for step, accuracy in enumerate(simulation.accuracies):
        assert accuracy == pytest.approx(right[step : len(right) - 2 + step].mean().item())


def test_texts_shorter_than_the_chain_are_refused() -> None:
    texts = [(torch.arange(5), torch.empty(5, 0), 3)]

    with pytest.raises(ValueError, match=r"chain_length=4.*max_new_tokens"):
        simulate(BigramDrafter(torch.arange(5)), texts, chain_length=4)


def test_most_frequent_successors_count_supervised_tokens_only(random_seed: int) -> None:
    generator = torch.Generator().manual_seed(random_seed)
    texts = [
        (torch.randint(9, (n,), generator=generator), torch.rand(n, generator=generator) < 0.7)
        for n in (1, 60, 40)
    ]
    counts = torch.zeros(10, 10)
    for ids, mask in texts:
        for place in range(1, len(ids)):
            counts[ids[place - 1], ids[place]] += bool(mask[place])

    successors = most_frequent_successors(texts, vocab_size=10)

    expected = counts.argmax(1)
    expected[counts.sum(1) == 0] = counts.sum(0).argmax()
    assert torch.equal(successors, expected)
