"""Evaluation and probes inside colocated jobs on a GPU: SGLang's captures, the GPU ring, MPS."""

import pytest

from tests import tiny
from tests.gpu import machine
from tests.jobs.start import files, job, losses
from tests.jobs.test_evaluation import measured
from tests.jobs.test_resume import weights

pytestmark = [pytest.mark.gpu, machine.needs_gpus(1), pytest.mark.timeout(400)]

STEPS = 12
TIMEOUT_S = 200
DRAFTS = {
    "eagle3": ["draft.ttt_length=3", "draft.draft_vocab_size=256"],
    # No last hidden states: a probe's come in a slot of their own.
    "dflash": ["draft=dflash", "draft.num_layers=2", "draft.block_size=4", "draft.num_anchors=16"],
}
MEASURES = ["trainer.eval_interval=4", "trainer.probe_interval=6", "trainer.probe_tokens=16"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu-evaluation")
    target = tiny.write_target(
        root / "target", hidden_size=256, num_layers=6, head_dim=64, num_key_value_heads=2
    )
    data = tiny.write_data(root / "train.jsonl", num_rows=80)
    shared = [word for word in tiny.overrides(root, target, data) if not word.startswith("draft.")]
    return [
        *shared, "target.dtype=bfloat16", "trainer.deterministic=true", "trainer.epochs=9",
        "data.held_out_samples=12", f"trainer.max_steps={STEPS}",
    ]  # fmt: skip


@pytest.mark.parametrize("draft", DRAFTS)
def test_evaluations_and_probes_leave_training_as_it_is(words, tmp_path, draft):
    runs = {}
    for name, more in (("plain", []), ("measured", MEASURES)):
        runs[name] = tmp_path / name
        own = [*DRAFTS[draft], *more, f"run_dir={runs[name]}"]
        output = job(2, "+mode=colocate", *words, *own, timeout_s=TIMEOUT_S)
    assert losses(runs["plain"]) == losses(runs["measured"])
    theirs = weights(runs["measured"], STEPS)
    for name, weight in weights(runs["plain"], STEPS).items():
        assert weight.equal(theirs[name]), name
    values = measured(runs["measured"])
    assert {step for step, name in values if name == "eval/loss"} == {4, 8, 12}
    assert values[12, "eval/loss"] < values[4, "eval/loss"]
    for step in (6, 12):
        assert 1 <= values[step, "probe/real_acceptance_length"] <= 4
        # Training computes in bfloat16 too, from the very numbers that are exported.
        exported = values[step, "probe/exported_simulated_acceptance_length"]
        assert exported == pytest.approx(
            values[step, "probe/simulated_acceptance_length"], rel=1e-3
        )
    assert "export bug" not in output
    assert not files(runs["measured"] / "probe")
