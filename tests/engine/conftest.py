"""Fresh inputs for every run of the tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.engine import targets


@pytest.fixture
def random_seed() -> int:
    """Draw a new seed; pytest shows it when a test fails."""
    torch.set_num_threads(1)
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture(scope="module")
def seed() -> int:
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    return targets.save(tmp_path_factory.mktemp("qwen3"), "Qwen3", seed=seed)
