"""Whole runs of the block drafter: its losses do not depend on the mode, nor on a stop between."""

import pytest
import torch

from colospec.checkpoint.state import load_model
from tests.jobs.start import job, losses

DRAFT = [
    "draft=dflash",
    *(f"draft.{word}" for word in ("num_layers=2", "block_size=4", "num_anchors=8")),
    "trainer.accumulation=2",
    "trainer.log_interval=1",
]


def of_dflash(tiny_job):
    """The tiny job, without the settings of another draft."""
    return [word for word in tiny_job if not word.startswith("draft.")] + DRAFT


def test_alternate_and_a_resumed_run_are_bit_equal_to_colocate(tiny_job, tmp_path):
    """Both runs draw anchors, so the generator must go on where the checkpoint left it."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = [*of_dflash(tiny_job), "trainer.schedule=constant"]
    job(2, "+mode=colocate", *common, "trainer.max_steps=8", f"run_dir={whole}")
    job(1, "+mode=alternate", *common, "trainer.max_steps=4", f"run_dir={halves}")
    job(1, "+mode=alternate", *common, "trainer.max_steps=8", f"run_dir={halves}")
    assert losses(halves) == losses(whole)
    assert len(losses(whole)) == 8
    mine, theirs = (load_model(path / "checkpoint" / "step-000008") for path in (halves, whole))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name
    assert "fc.weight" in mine


@pytest.mark.slow
def test_two_trainers_divide_by_the_slots_of_both(tiny_job, tmp_path):
    """Their own anchors differ from those of one trainer, so only the size of things is compared:
    a loss or a gradient norm that is a sum, or divided by one rank's slots, would be far off."""
    one, two = tmp_path / "one", tmp_path / "two"
    for ranks, accumulation, run_dir in ((2, 2, one), (4, 1, two)):
        words = [*of_dflash(tiny_job), f"trainer.accumulation={accumulation}"]
        job(ranks, "+mode=colocate", *words, "trainer.max_steps=3", f"run_dir={run_dir}")
    for name in ("train/loss", "train/grad_norm"):
        ours, theirs = losses(two, name), losses(one, name)
        for step in (1, 2, 3):
            assert 0.7 < ours[step] / theirs[step] < 1.4, (name, step)
