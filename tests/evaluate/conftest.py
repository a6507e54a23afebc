"""Fresh inputs for every run of the tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.evaluate.models import Untrained, make_untrained


@pytest.fixture
def random_seed() -> int:
    """Draw a new seed; pytest shows it when a test fails."""
    torch.set_num_threads(1)
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture
def untrained(tmp_path: Path, random_seed: int) -> Untrained:
    return make_untrained(tmp_path / "target", seed=random_seed)
