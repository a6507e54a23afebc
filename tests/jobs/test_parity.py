"""One plan, one loss: modes and splits of the same job agree."""

import pytest
import torch

from colospec.checkpoint.state import load_model
from tests.jobs.start import job, losses


@pytest.fixture(scope="module")
def colocate(tiny_job, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("colocate") / "run"
    job(2, "+mode=colocate", *tiny_job, "trainer.max_steps=50", "trainer.accumulation=2",
        "trainer.save_interval=1", "trainer.keep=60", f"run_dir={run_dir}")  # fmt: skip
    return run_dir


def test_alternate_is_bit_equal_to_colocate_over_50_steps(colocate, tiny_job, tmp_path):
    run_dir = tmp_path / "run"
    job(1, "+mode=alternate", *tiny_job, "trainer.max_steps=50", "trainer.accumulation=2",
        f"run_dir={run_dir}")  # fmt: skip
    assert losses(run_dir) == losses(colocate)
    assert losses(run_dir, "train/grad_norm") == losses(colocate, "train/grad_norm")
    assert len(losses(run_dir)) == 50
    mine, theirs = (load_model(d / "checkpoint" / "step-000050") for d in (run_dir, colocate))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name


def test_two_trainers_equal_one_with_twice_the_accumulation(colocate, tiny_job, tmp_path):
    run_dir = tmp_path / "run"
    job(4, "+mode=colocate", *tiny_job, "trainer.max_steps=50", "trainer.accumulation=1",
        "trainer.save_interval=1", "trainer.keep=60", f"run_dir={run_dir}")  # fmt: skip
    ours, theirs = losses(run_dir), losses(colocate)
    assert ours.keys() == theirs.keys()
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], abs=1e-5)
