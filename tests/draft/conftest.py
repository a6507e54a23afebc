"""Fresh random numbers for the draft tests."""

import random

import pytest
import torch


@pytest.fixture
def random_seed():
    """Draw a new seed; pytest shows it when a test fails."""
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture
def generator(random_seed):
    return torch.Generator().manual_seed(random_seed)
