"""python -m colospec.checkpoint.export: a checkpoint becomes an export."""

import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from colospec.checkpoint.dcp import Checkpointer
from colospec.checkpoint.export import load_draft, main
from colospec.train.provenance import plain
from tests.checkpoint.exports import make_draft


def save_checkpoint(target, config, draft, directory, form="sglang"):
    checkpointer = Checkpointer(
        directory, group=None, rank=0, world_size=1, keep=1, best_metric="train/loss", limit_s=60
    )
    meta = {
        "run": {
            "draft": plain(config),
            "target": {"dtype": "auto"},
            "export": {"format": form, "dtype": "float16"},
        },
        "target": str(target.path),
        "facts": {"data_fingerprint": "f00d"},
    }
    state = {"model": draft.state_dict(), "optimizer": {"state": {"x": torch.ones(2)}}}
    checkpointer.save(9, state, meta, metrics={"train/loss": 0.5})
    checkpointer.wait()
    return directory / "step-000009"


def test_the_command_line_exports_a_checkpoint(target, tmp_path):
    config, draft = make_draft(target, ttt_length=5)
    checkpoint = save_checkpoint(target, config, draft, tmp_path / "run")
    command = [sys.executable, "-m", "colospec.checkpoint.export", checkpoint, tmp_path / "out"]
    done = subprocess.run(
        [*command, "--dtype", "float32"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "step 9 exported to" in done.stderr
    loaded = load_draft(tmp_path / "out", target)
    assert loaded.config.ttt_length == 5
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in draft.state_dict().items())
    assert "| step | 9 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "layer", "dtype"),
    [
        ((), "layers.0", torch.float16),
        (("--format", "sglang", "--dtype", "bfloat16"), "midlayer", torch.bfloat16),
    ],
)
def test_the_command_line_takes_format_and_dtype_from_the_run_or_from_its_options(
    target, tmp_path, options, layer, dtype
):
    config, draft = make_draft(target)
    checkpoint = save_checkpoint(target, config, draft, tmp_path / "run", "speculators")
    main([str(checkpoint), str(tmp_path / "out"), *options])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{layer}.self_attn.q_proj.weight"].dtype == dtype


def test_the_command_line_refuses_what_is_no_checkpoint_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(SystemExit, match=r"error: \S+ is not a whole checkpoint .*manifest.json"):
        main([str(tmp_path), str(tmp_path / "out")])
