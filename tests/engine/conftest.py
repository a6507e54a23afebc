"""Fresh inputs for every run of the tests."""

from __future__ import annotations

import random

import pytest
import torch


@pytest.fixture
def random_seed() -> int:
    """Draw a new seed; pytest shows it when a test fails."""
    torch.set_num_threads(1)
    return random.SystemRandom().randrange(1 << 30)
