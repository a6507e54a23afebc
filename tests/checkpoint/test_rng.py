"""Random states: everything that draws goes on as if nothing had happened, each rank for itself."""

import random

import numpy as np
import pytest
import torch

from colospec.checkpoint.rng import RNG_BYTES, capture_rng, rank_seed, restore_rng


def draw(generator):
    return (
        torch.rand(3).tolist(),
        torch.randn(3, generator=generator).tolist(),
        np.random.randn(3).tolist(),
        [random.random(), random.gauss(0, 1)],
    )


@pytest.mark.parametrize("drawn_before", [0, 1, 700])
def test_restored_generators_repeat_their_draws(drawn_before):
    generator = torch.Generator().manual_seed(random.randrange(2**40))
    for _ in range(drawn_before):
        # Odd numbers of normal draws leave one cached in numpy's and Python's generators.
        torch.rand(1)
        np.random.randn()
        random.gauss(0, 1)
        torch.randn(1, generator=generator)
    states = capture_rng(generator, rank=3)
    first = draw(generator)

    restore_rng(states, generator, rank=3, seed=0, step=0)

    assert draw(generator) == first
    assert (states["3"].shape, states["3"].dtype) == ((RNG_BYTES,), torch.uint8)


def test_a_rank_without_a_state_is_seeded_by_seed_rank_and_step():
    generator = torch.Generator()
    states = capture_rng(generator, rank=0)
    draws = []
    for seed, rank, step in [(0, 1, 5), (0, 1, 5), (1, 1, 5), (0, 2, 5), (0, 1, 6)]:
        restore_rng(states, generator, rank=rank, seed=seed, step=step)
        draws.append(draw(generator))
    assert draws[0] == draws[1]
    assert all(one != draws[0] for one in draws[2:])
    assert draws[0][0] != draws[0][1]


def test_seeds_of_ranks_are_distinct_and_fit_every_generator():
    seeds = {rank_seed(s, rank, step) for s in range(5) for rank in range(64) for step in (0, 500)}
    assert len(seeds) == 5 * 64 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
