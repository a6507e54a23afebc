"""A whole run of a drafter that also learns the target's distribution: train, stop, go on."""

import json

import pytest
import torch

from colospec.checkpoint.state import load_model
from tests.jobs.start import job, losses

DRAFT = [
    "draft=dspark",
    *(f"draft.{word}" for word in ("num_layers=2", "block_size=4", "num_anchors=8")),
    "draft.markov_rank=8",
    "draft.markov_head_type=rnn",
    "trainer.log_interval=1",
    "trainer.schedule=constant",
]


@pytest.mark.slow
def test_a_resumed_run_in_the_other_mode_ends_with_the_same_weights(tiny_job, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = [word for word in tiny_job if not word.startswith("draft.")] + DRAFT
    job(2, "+mode=colocate", *common, "trainer.max_steps=4", f"run_dir={whole}")
    job(1, "+mode=alternate", *common, "trainer.max_steps=2", f"run_dir={halves}")
    job(1, "+mode=alternate", *common, "trainer.max_steps=4", f"run_dir={halves}")
    assert losses(halves) == losses(whole)
    assert losses(whole, "train/tau_probabilistic")[4] >= 1
    mine, theirs = (load_model(path / "checkpoint" / "step-000004") for path in (halves, whole))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name
    contents = json.loads((whole / "export" / "config.json").read_text())
    assert contents["architectures"] == ["Qwen3DSparkModel"]
