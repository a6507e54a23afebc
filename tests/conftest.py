"""Fixtures that several test files share."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory):
    """Overrides of a tiny whole job: target, data and sizes; everything in a folder of its own."""
    from tests import tiny

    root = tmp_path_factory.mktemp("tiny")
    target = tiny.write_target(root / "target")
    data = tiny.write_data(root / "train.jsonl")
    return tiny.overrides(root, target, data)
