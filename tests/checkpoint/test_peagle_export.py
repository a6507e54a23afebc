"""Exported P-EAGLE drafts: public names and keys, round trips, the form of speculators."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.checkpoint.export import load_draft
from colospec.checkpoint.warm_start import check_warm_start
from colospec.config import ExportFormat
from colospec.draft import registry
from colospec.draft.base import StepContext
from colospec.draft.peagle.config import PEagleConfig
from tests.checkpoint.exports import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    MLP,
    H,
    V,
    W,
    export,
)


def layer(width):
    return {
        "input_layernorm.weight": [H],
        "post_attention_layernorm.weight": [H],
        "self_attn.q_proj.weight": [HEADS * HEAD_DIM, width],
        "self_attn.k_proj.weight": [KV_HEADS * HEAD_DIM, width],
        "self_attn.v_proj.weight": [KV_HEADS * HEAD_DIM, width],
        "self_attn.o_proj.weight": [H, HEADS * HEAD_DIM],
        "mlp.gate_proj.weight": [MLP, H],
        "mlp.up_proj.weight": [MLP, H],
        "mlp.down_proj.weight": [H, MLP],
    }


GOLDEN = {
    "fc.weight": [H, 3 * H],
    "mask_hidden": [1, 1, 3 * H],
    "norm.weight": [H],
    "layers.0.hidden_norm.weight": [H],
    **{f"layers.0.{name}": shape for name, shape in layer(2 * H).items()},
    **{f"layers.1.{name}": shape for name, shape in layer(H).items()},
}


def make_draft(target, **settings):
    values = {"num_layers": 2, "num_depths": 5, "draft_vocab_size": W}
    config = PEagleConfig(**(values | settings))
    return config, registry.build(config, target, token_counts=torch.rand(V))


def same_losses(*drafts):
    ids = torch.randint(V, (30,))
    tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [torch.ones(30, dtype=torch.bool)])
    batch = FeatureBatch(tokens, Features(torch.randn(30, 3 * H), torch.randn(30, H)))
    losses = []
    for model in drafts:
        context = StepContext(0, 1, 30, torch.Generator().manual_seed(1))
        losses.append(model(batch, context).loss.item())
    assert losses[0] > 0
    return len(set(losses)) == 1


@pytest.mark.parametrize("pruned", [True, False])
def test_names_shapes_and_dtypes_are_the_public_ones(target, tmp_path, pruned):
    config, draft = make_draft(target, draft_vocab_size=W if pruned else None)
    export(draft, config, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    mapping = {"d2t": [W], "t2d": [V]} if pruned else {}
    head = {"lm_head.weight": [W if pruned else V, H]}
    expected = GOLDEN | mapping | head
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    for name, tensor in tensors.items():
        wanted = {"d2t": torch.int64, "t2d": torch.bool}.get(name, torch.bfloat16)
        assert tensor.dtype is wanted, name


def test_config_says_what_engines_read(target, tmp_path):
    config, draft = make_draft(target, aux_layer_ids=[0, 2, 5], mask_token_id=7)
    export(draft, config, target, tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["PEagleDraftModel"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "draft_vocab_size": W,
        "vocab_size": V,
        "norm_before_residual": False,
        # Inputs of decoder layers, one more than outputs.
        "eagle_aux_hidden_state_layer_ids": [1, 3, 6],
        "ptd_token_id": 7,
        "pard_token": 7,
        "mask_token_id": 7,
    }
    assert {key: contents[key] for key in expected} == expected
    assert contents["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]


def test_a_loaded_draft_computes_the_same_loss(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    loaded = load_draft(tmp_path / "out", target)
    assert loaded.config.num_depths == 5
    assert same_losses(draft, loaded)


def test_a_draft_of_speculators_is_understood(target, tmp_path):
    config, draft = make_draft(target, aux_layer_ids=[0, 2, 5], mask_token_id=7)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    file = tmp_path / "out" / "config.json"
    contents = json.loads(file.read_text())
    for key in ("colospec", "eagle_config", "ptd_token_id", "pard_token", "rope_theta"):
        del contents[key]
    theirs = {
        "architectures": ["PEagleSpeculator"],
        "speculators_model_type": "peagle",
        "draft_vocab_size": contents.pop("draft_vocab_size"),
        "eagle_aux_hidden_state_layer_ids": contents.pop("eagle_aux_hidden_state_layer_ids"),
        "mask_token_id": contents.pop("mask_token_id"),
        "norm_before_residual": False,
        "transformer_layer_config": contents,
        "speculators_config": {"proposal_methods": [{"speculative_tokens": 5}]},
    }
    file.write_text(json.dumps(theirs))
    weights = tmp_path / "out" / "model.safetensors"
    save_file(load_file(weights) | {"embed_tokens.weight": torch.ones(V, H)}, weights)

    loaded = load_draft(tmp_path / "out", target)

    check_warm_start(config, tmp_path / "out", target)
    assert loaded.config.num_depths == 5
    assert same_losses(draft, loaded)


@pytest.mark.parametrize("name", ["norm_before_residual", "norm_output", "fc_norm"])
def test_options_that_compute_something_else_are_refused(target, tmp_path, name):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: True}))
    with pytest.raises(ValueError, match=f"{name}=true is a variant"):
        load_draft(tmp_path / "out", target)


def test_the_card_says_what_serves_it(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# P-EAGLE draft model for target-model" in card
    assert "SGLang 0.5.17 has no P-EAGLE" in card
    assert "--format speculators" in card
    export(draft, config, target, tmp_path / "out", format=ExportFormat.speculators)
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"num_speculative_tokens": 5, "parallel_drafting": true' in card
