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
    return [
        f"target.path={target}",
        f"data.path={data}",
        f"data.cache_dir={root}/cache",
        "data.max_length=300",
        "data.token_budget=512",
        "data.num_workers=1",
        "draft.ttt_length=3",
        "draft.draft_vocab_size=256",
        "trainer.lr=1e-3",
        "trainer.log_interval=1",
    ]
