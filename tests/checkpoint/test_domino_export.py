"""Exported Domino drafts: published names and keys, and round trips."""

import json

import pytest
import torch
from safetensors.torch import load_file

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.checkpoint.export import load_draft
from colospec.checkpoint.warm_start import check_warm_start
from colospec.draft import registry
from colospec.draft.base import StepContext
from colospec.draft.domino.config import DominoConfig
from tests.checkpoint.exports import H, V, export
from tests.checkpoint.test_dflash_export import GOLDEN as BACKBONE


def make_draft(target, **settings):
    values = {"num_layers": 2, "block_size": 5, "num_anchors": 9}
    config = DominoConfig(**(values | {"gru_hidden_dim": 7, "emb_dim": 6} | settings))
    return config, registry.build(config, target, token_counts=None)


def test_names_shapes_and_settings_are_the_published_ones(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        **BACKBONE,
        "prefix_gru.weight_ih_l0": [21, H],
        "prefix_gru.weight_hh_l0": [21, 7],
        "embed_proj.0.weight": [6, H + 7],
        "embed_proj.2.weight": [V, 6],
    }
    contents = json.loads((tmp_path / "out" / "config.json").read_text())
    assert contents["architectures"] == ["DominoDraftModel"]
    inner = contents["dflash_config"]
    assert inner["projector_type"] == "domino"
    assert (inner["emb_dim"], inner["gru_hidden_dim"]) == (6, 7)
    assert (inner["pure_draft_prefix_len"], inner["shift_label"]) == (1, True)


@pytest.mark.parametrize("shift", [True, False])
def test_a_loaded_draft_computes_the_same_loss(target, tmp_path, shift):
    config, draft = make_draft(target, shift_label=shift, pure_draft_prefix_len=2)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)

    loaded = load_draft(tmp_path / "out", target)

    ids = torch.randint(V, (30,))
    tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [torch.ones(30, dtype=torch.bool)])
    batch = FeatureBatch(tokens, Features(torch.randn(30, 5 * H), None))
    losses = []
    for model in (draft, loaded):
        model.config.num_anchors = 100
        context = StepContext(3, 10, 30, torch.Generator().manual_seed(1))
        losses.append(model(batch, context).loss.item())
    assert losses[0] == losses[1] > 0


def test_a_warm_start_with_other_labels_is_refused(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    check_warm_start(config, tmp_path / "out", target)
    other, _ = make_draft(target, shift_label=False)
    with pytest.raises(ValueError, match=r"draft\.shift_label: True -> False"):
        check_warm_start(other, tmp_path / "out", target)


def test_the_card_says_that_no_engine_serves_it(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Domino draft model for target-model" in card
    assert "No released version of SGLang or vLLM serves Domino" in card
    assert "| block | 5 tokens are read, 5 drafted |" in card


def test_sglang_is_not_asked_to_serve_it_as_dflash(target):
    config, draft = make_draft(target)
    with pytest.raises(ValueError, match=r"does not serve draft\.algorithm=domino"):
        draft.public.sglang_arguments(config, 4)
