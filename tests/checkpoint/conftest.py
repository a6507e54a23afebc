"""The target of the export tests."""

import pytest

from tests.checkpoint.exports import make_target


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "target-model")
