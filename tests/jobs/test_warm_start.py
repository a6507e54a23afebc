"""Whole runs that export in a chosen format, and start from such an export."""

import json

from safetensors.torch import load_file

from tests.jobs.start import job


def test_a_run_starts_from_the_export_of_another(tiny_job, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    common = [*tiny_job, "trainer.max_steps=2", "export.dtype=float16"]
    job(1, "+mode=alternate", *common, "export.format=speculators", f"run_dir={first}")
    tensors = load_file(first / "export" / "model.safetensors")
    assert "layers.0.self_attn.q_proj.weight" in tensors
    contents = json.loads((first / "export" / "config.json").read_text())
    assert (contents["speculators_model_type"], contents["dtype"]) == ("eagle3", "float16")

    output = job(
        1, "+mode=alternate", *common, f"trainer.init_from={first / 'export'}", "trainer.lr=0",
        "trainer.init_vocab=rebuild", f"run_dir={second}",
    )  # fmt: skip

    assert "rebuilt its vocabulary" in output
    # Nothing was learnt, so it is the first draft under its other names.
    again = load_file(second / "export" / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.equal(again[name.replace("layers.0.", "midlayer.")]), name


def test_a_format_that_the_draft_does_not_fit_is_refused_before_training(tiny_job, tmp_path):
    words = [word for word in tiny_job if not word.startswith("draft.")]
    draft = ["draft=dflash", "draft.num_layers=2", "draft.sliding_layers=[0]"]
    output = job(
        1, "+mode=alternate", *words, *draft, "draft.sliding_window=4",
        "export.format=speculators", f"run_dir={tmp_path / 'run'}", expect=1,
    )  # fmt: skip
    assert "export.format=speculators cannot hold draft.sliding_layers=[0]" in output
    assert not list((tmp_path / "run").glob("checkpoint/step-*"))
