"""One plan, one loss: modes and splits of the same job agree."""

import re

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from colospec.checkpoint.state import load_model
from tests.jobs.start import job, losses

STEPS = 100


def words(run_dir, accumulation):
    return [
        f"trainer.max_steps={STEPS}",
        f"trainer.accumulation={accumulation}",
        "trainer.save_interval=1",
        f"trainer.keep={STEPS}",
        f"run_dir={run_dir}",
    ]


@pytest.fixture(scope="module")
def one_trainer(tiny_job, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("colocate") / "run"
    job(2, "+mode=colocate", *tiny_job, *words(run_dir, 2))
    return run_dir


@pytest.fixture(scope="module")
def two_trainers(tiny_job, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("colocate") / "run"
    job(4, "+mode=colocate", *tiny_job, *words(run_dir, 1))
    return run_dir


def first_gradients(run_dir, file):
    """The gradients of step 1, from Adam's first moment: exp_avg = (1 - beta1) * gradient."""
    dcp_to_torch_save(run_dir / "checkpoint" / "step-000001", file)
    state = torch.load(file, weights_only=False)["optimizer"]["state"]
    return {name: values["exp_avg"] / (1 - 0.9) for name, values in state.items()}


def test_alternate_is_bit_equal_to_colocate(one_trainer, tiny_job, tmp_path):
    """Though the trainer of the latter has gone through a step before, while it waited."""
    run_dir = tmp_path / "run"
    job(1, "+mode=alternate", *tiny_job, *words(run_dir, 2))
    warm = [
        (path / "log/rank0.log").read_text().count("warmed up") for path in (one_trainer, run_dir)
    ]
    assert warm == [1, 0]
    assert losses(run_dir) == losses(one_trainer)
    assert losses(run_dir, "train/grad_norm") == losses(one_trainer, "train/grad_norm")
    assert len(losses(run_dir)) == STEPS
    last = f"checkpoint/step-{STEPS:06d}"
    mine, theirs = load_model(run_dir / last), load_model(one_trainer / last)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name


def test_time_left_is_told_from_the_second_report_on(one_trainer):
    """The first step compiles kernels; what it took is not the pace of the others."""
    lines = (one_trainer / "log" / "rank0.log").read_text().splitlines()
    told = [line.split("  eta ")[1] for line in lines if "  eta " in line]
    assert told[0] == "-"
    assert told[-1] == "0m00s"
    assert all(re.fullmatch(r"\d+m\d\ds", one) for one in told[1:])


@pytest.mark.slow
def test_copied_leases_give_the_same_losses_as_views(one_trainer, tiny_job, tmp_path):
    run_dir = tmp_path / "run"
    settings = ["trainer.max_steps=100", "trainer.accumulation=2", "ring.lease=copy"]
    job(2, "+mode=colocate", *tiny_job, *settings, f"run_dir={run_dir}")
    assert losses(run_dir) == losses(one_trainer)


def test_two_trainers_have_the_losses_of_one_with_twice_the_accumulation(one_trainer, two_trainers):
    ours, theirs = losses(two_trainers), losses(one_trainer)
    assert ours.keys() == theirs.keys()
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], abs=1e-5)


def test_two_trainers_have_the_first_gradients_of_one(one_trainer, two_trainers, tmp_path):
    ours = first_gradients(two_trainers, tmp_path / "two.pt")
    theirs = first_gradients(one_trainer, tmp_path / "one.pt")
    assert ours.keys() == theirs.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=0)
