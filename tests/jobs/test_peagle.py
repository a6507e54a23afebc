"""A whole run of the parallel drafter: it draws its places alike in both modes."""

import pytest

from tests.jobs.start import job, losses

DRAFT = [
    "draft=peagle",
    *(f"draft.{word}" for word in ("num_layers=2", "num_depths=4", "draft_vocab_size=256")),
    "trainer.log_interval=1",
]


@pytest.mark.slow
def test_colocate_and_a_resumed_run_have_the_same_losses(tiny_job, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = [word for word in tiny_job if not word.startswith("draft.")] + DRAFT
    common += ["trainer.max_steps=4", "trainer.save_interval=2", "trainer.keep=9"]
    job(2, "+mode=colocate", *common, f"run_dir={whole}")
    checkpoint = whole / "checkpoint" / "step-000002"
    job(1, "+mode=alternate", *common, f"run_dir={halves}", f"resume={checkpoint}")
    expected = losses(whole)
    assert losses(halves) == {step: expected[step] for step in (3, 4)}
    assert (whole / "export" / "model.safetensors").is_file()
