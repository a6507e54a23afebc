"""An export is whole or not there: wrong states, other directories, death and full disks."""

import os
import resource

import pytest
import torch
from safetensors.torch import load_file

from colospec.checkpoint.export import export_draft, load_draft
from colospec.target import Target
from tests.checkpoint.exports import H, V, W, export, make_draft
from tests.ranks import RankError, run_ranks


def break_missing(state):
    del state["norm.weight"]


def break_unexpected(state):
    state["embed_tokens.weight"] = torch.ones(V, H)


def break_shape(state):
    state["fc.weight"] = state["fc.weight"][:, :-1]


def break_dtype(state):
    state["d2t"] = state["d2t"].to(torch.int32)


def break_nan(state):
    state["norm.weight"] = state["norm.weight"] * float("nan")


def break_overflow(state):
    state["norm.weight"] = state["norm.weight"] * 1e39


def break_mapping(state):
    state["d2t"] = state["d2t"] + torch.arange(W)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (break_missing, "missing: norm.weight"),
        (break_unexpected, "unexpected: embed_tokens.weight"),
        (break_shape, r"fc.weight has shape \[16, 47\], expected \[16, 48\]"),
        (break_dtype, "d2t has dtype int32, expected int64"),
        (break_nan, "norm.weight has NaN or Inf in torch.bfloat16"),
        (break_overflow, "norm.weight has NaN or Inf in torch.bfloat16"),
        (break_mapping, "d2t and t2d disagree"),
    ],
)
def test_a_wrong_state_is_refused_and_the_export_before_it_stays(
    target, tmp_path, fault, complaint
):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    state = draft.state_dict()
    fault(state)
    with pytest.raises(ValueError, match=complaint):
        export_draft(state, tmp_path / "out", config=config, target=target, facts={})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "out.tmp").exists()


def test_an_export_is_replaced_whole(target, tmp_path):
    for _ in range(2):
        config, draft = make_draft(target)
        export(draft, config, target, tmp_path / "out", dtype=torch.float32)
        assert torch.equal(
            load_file(tmp_path / "out" / "model.safetensors")["fc.weight"], draft.fc.weight
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target-model"]


def test_a_directory_that_is_no_export_is_not_replaced(target, tmp_path):
    config, draft = make_draft(target)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    for directory in (tmp_path / "home", target.path):
        with pytest.raises(ValueError, match="not a draft that colospec exported"):
            export(draft, config, target, directory)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


def export_and_die(_rank, directory, when):
    target = Target.load(directory / "target-model")
    config, draft = make_draft(target)
    import colospec.checkpoint.export as module

    def die(*_args, **_options):
        os.kill(os.getpid(), 9)

    setattr(module, when, die)
    export(draft, config, target, directory / "out")


@pytest.mark.parametrize("when", ["save_file", "publish"])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_export_leaves_no_half_directory(target, tmp_path, when, exists):
    config, draft = make_draft(target)
    if exists:
        export(draft, config, target, tmp_path / "out")
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(export_and_die, 1, tmp_path, when)
    assert (tmp_path / "out").exists() == exists
    if exists:
        load_draft(tmp_path / "out", target)
    export(draft, config, target, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target-model"]


def export_to_a_full_disk(_rank, directory):
    target = Target.load(directory / "target-model")
    config, draft = make_draft(target)
    export(draft, config, target, directory / "out")
    before = (directory / "out" / "model.safetensors").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    with pytest.raises(RuntimeError, match=r"not exported to \S+/out: .* are free on that disk"):
        export(draft, config, target, directory / "out")
    assert (directory / "out" / "model.safetensors").read_bytes() == before
    assert not (directory / "out.tmp").exists()


def test_a_full_disk_leaves_the_export_before_it(target, tmp_path):
    run_ranks(export_to_a_full_disk, 1, tmp_path)
    load_draft(tmp_path / "out", target)
