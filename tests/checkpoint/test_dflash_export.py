"""Exported DFlash drafts: public names and keys, round trips, other trainers' names, warm start."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.checkpoint.export import load_draft, load_weights
from colospec.checkpoint.warm_start import check_warm_start
from colospec.draft import registry
from colospec.draft.base import StepContext
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.eagle3.config import Eagle3Config
from tests.checkpoint.exports import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    H,
    V,
    export,
)

# The public tensors of a DFlash draft of two layers on five of the target's, spelled out.
LAYER = {
    "input_layernorm.weight": [H],
    "post_attention_layernorm.weight": [H],
    "self_attn.q_proj.weight": [HEADS * HEAD_DIM, H],
    "self_attn.k_proj.weight": [KV_HEADS * HEAD_DIM, H],
    "self_attn.v_proj.weight": [KV_HEADS * HEAD_DIM, H],
    "self_attn.o_proj.weight": [H, HEADS * HEAD_DIM],
    "self_attn.q_norm.weight": [HEAD_DIM],
    "self_attn.k_norm.weight": [HEAD_DIM],
    "mlp.gate_proj.weight": [MLP, H],
    "mlp.up_proj.weight": [MLP, H],
    "mlp.down_proj.weight": [H, MLP],
}
GOLDEN = {
    "fc.weight": [H, 5 * H],
    "hidden_norm.weight": [H],
    "norm.weight": [H],
    **{f"layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
}


IDS = {"mask_token_id": 3, "target_layer_ids": [1, 2, 3, 4, 5]}


def make_draft(target, **settings):
    config = DFlashConfig(**({"num_layers": 2, "block_size": 5, "num_anchors": 9} | settings))
    return config, registry.build(config, target, token_counts=None)


def test_names_shapes_and_dtypes_are_the_public_ones(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == GOLDEN
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_config_says_what_sglang_and_transformers_read(target, tmp_path):
    config, draft = make_draft(
        target,
        sliding_layers=[0],
        sliding_window=64,
        mask_token_id=3,
        aux_layer_ids=[5, 0, 2, 3, 4],
    )
    export(draft, config, target, tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "config.json").read_text())
    version = contents.pop("colospec")
    assert set(version) == {"version", "num_anchors"}
    assert contents == {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": H,
        "target_hidden_size": H,
        "intermediate_size": MLP,
        "num_hidden_layers": 2,
        "num_target_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "vocab_size": V,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "block_size": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 2,
        "dflash_config": {
            "block_size": 5,
            "mask_token_id": 3,
            # Outputs of decoder layers, from 0.
            "target_layer_ids": [0, 2, 3, 4, 5],
            "num_target_layers": LAYERS,
        },
    }
    parsed = Qwen3Config.from_pretrained(tmp_path / "out")
    assert parsed.layer_types == contents["layer_types"]
    assert (parsed.sliding_window, parsed.head_dim) == (64, HEAD_DIM)
    assert parsed.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("settings", [{}, {"sliding_layers": [1], "sliding_window": 4}])
def test_a_loaded_draft_computes_the_same_loss(target, tmp_path, settings):
    config, draft = make_draft(target, **settings)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)

    loaded = load_draft(tmp_path / "out", target)

    ids = torch.randint(V, (30,))
    tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [torch.ones(30, dtype=torch.bool)])
    batch = FeatureBatch(tokens, Features(torch.randn(30, 5 * H), None))
    losses = []
    for model in (draft, loaded):
        model.config.num_anchors = 100
        context = StepContext(0, 1, 30, torch.Generator().manual_seed(1))
        losses.append(model(batch, context).loss.item())
    assert losses[0] == losses[1] > 0


def rename(directory, change, more=()):
    file = directory / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors | dict(more), file)


def test_names_of_other_trainers_and_the_targets_own_tensors_are_understood(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    names = {"fc.": "context_proj.", "hidden_norm.": "context_norm.", "norm.": "final_norm."}

    def theirs(name):
        old = next((old for old in names if name.startswith(old)), None)
        return "model." + (name if old is None else names[old] + name.removeprefix(old))

    own = {"model.embed_tokens.weight": torch.ones(V, H), "lm_head.weight": torch.ones(V, H)}
    rename(tmp_path / "out", theirs, own)
    _, fresh = make_draft(target)

    load_weights(fresh, tmp_path / "out")

    for name, tensor in draft.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    assert not torch.equal(fresh.embedding, torch.ones(V, H))


def test_a_config_in_the_plain_form_is_understood(target, tmp_path):
    config, draft = make_draft(target, mask_token_id=4)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    file = tmp_path / "out" / "config.json"
    contents = json.loads(file.read_text())
    inner = contents.pop("dflash_config")
    del contents["colospec"], contents["layer_types"]
    inner |= {"num_target_layers": 5, "target_num_hidden_layers": LAYERS}
    file.write_text(json.dumps(contents | inner))
    loaded = load_draft(tmp_path / "out", target)
    assert loaded.config.mask_token_id == 4
    assert loaded.config.aux_layer_ids == inner["target_layer_ids"]


def as_speculators(directory, **changes):
    """Rewrite an export as speculators lays it out."""
    file = directory / "config.json"
    contents = json.loads(file.read_text())
    inner = contents.pop("dflash_config")
    for key in ("colospec", "num_target_layers", "architectures", "block_size", "rope_theta"):
        contents.pop(key)
    theirs = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": contents,
        "draft_vocab_size": V,
        "block_size": inner["block_size"],
        "mask_token_id": inner["mask_token_id"],
        "aux_hidden_state_layer_ids": [layer + 1 for layer in inner["target_layer_ids"]],
        "sliding_window_non_causal": False,
    }
    file.write_text(json.dumps(theirs | changes))
    rename(directory, str, {"verifier_lm_head.weight": torch.ones(V, H)})


def test_a_draft_of_speculators_is_understood(target, tmp_path):
    config, draft = make_draft(target, sliding_layers=[0], sliding_window=6, mask_token_id=4)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    as_speculators(tmp_path / "out")

    loaded = load_draft(tmp_path / "out", target)

    check_warm_start(config, tmp_path / "out", target)
    assert loaded.config.block_size == 5
    assert draft.public.inputs(loaded.config, target) == draft.public.inputs(config, target)
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"draft_vocab_size": 9}, "draft_vocab_size=9"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"sliding_window_non_causal": True}, "sliding_window_non_causal"),
        ({"transformer_layer_config": {"hidden_size": 99}}, "vocabulary|num_hidden_layers"),
    ],
)
def test_options_of_speculators_that_compute_something_else_are_refused(
    target, tmp_path, changes, complaint
):
    config, draft = make_draft(target, sliding_layers=[0], sliding_window=6)
    export(draft, config, target, tmp_path / "out")
    as_speculators(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=complaint):
        load_draft(tmp_path / "out", target)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dflash_config": {"projector_type": "domino"}}, "projector_type=domino"),
        ({"dflash_config": {}, "target_layer_ids": None}, "target_layer_ids"),
        ({"num_target_layers": 99}, "num_target_layers 99, expected 8"),
        ({"block_size": 1, "dflash_config": IDS}, "block_size=1 must be at least 2"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window=None need each other"),
        ({"is_causal": True}, "causal=True for layer 0, a full one"),
        ({"layer_types": ["sliding_attention"] * 2, "is_causal": False}, "0, a sliding one"),
        ({"dflash_config": {**IDS, "causal": True}}, "causal=True for layer 0"),
        ({"dflash_config": {**IDS, "use_swa": True}}, "use_swa"),
        ({"dflash_config": {**IDS, "attention_mode": "mla"}}, "attention_mode=mla"),
    ],
)
def test_a_config_that_we_cannot_reproduce_is_refused(target, tmp_path, change, complaint):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=complaint):
        load_draft(tmp_path / "out", target)


def test_missing_and_unexpected_tensors_are_listed(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    rename(tmp_path / "out", lambda name: name.replace("q_norm", "query_norm"))
    with pytest.raises(
        ValueError, match=r"missing: layers.0.self_attn.q_norm.*unexpected: .*query"
    ):
        load_draft(tmp_path / "out", target)


def test_a_warm_start_from_another_algorithm_or_other_inputs_is_refused(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    check_warm_start(config, tmp_path / "out", target)
    check_warm_start(replace(config, num_anchors=1), tmp_path / "out", target)
    with pytest.raises(ValueError, match=r"draft\.mask_token_id: 49 -> 3"):
        check_warm_start(replace(config, mask_token_id=3), tmp_path / "out", target)
    with pytest.raises(ValueError, match=r"a draft of draft=dflash, not eagle3"):
        check_warm_start(Eagle3Config(), tmp_path / "out", target)


def test_the_card_names_the_block_and_the_serve_command(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# DFlash draft model for target-model" in card
    assert "--speculative-algorithm DFLASH --speculative-draft-model-path DRAFT" in card
    assert "--speculative-num-draft-tokens 5" in card
    assert "EAGLE" not in card
