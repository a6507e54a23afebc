"""Exported drafts of EAGLE-3: public names and keys, the card, bit-identical round trips."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.checkpoint.export import load_draft, load_weights
from colospec.draft.base import StepContext
from tests.checkpoint.exports import (
    GOLDEN,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    H,
    V,
    W,
    export,
    make_draft,
    make_target,
)


def test_names_shapes_and_dtypes_are_the_public_ones(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == GOLDEN
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert (kinds.pop("t2d"), kinds.pop("d2t")) == (torch.bool, torch.int64)
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "gone", "more"),
    [
        ({"draft_vocab_size": None}, {"t2d", "d2t"}, set()),
        ({"fc_norm": True}, set(), {f"fc_norm.{i}.weight" for i in range(3)}),
        ({"aux_layer_ids": [0, 2, 3, 5], "fc_norm": True}, set(), {"fc_norm.3.weight"}),
    ],
)
def test_options_add_and_remove_tensors(target, tmp_path, settings, gone, more):
    config, draft = make_draft(target, **settings)
    export(draft, config, target, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert gone.isdisjoint(names)
    assert more <= names
    assert set(GOLDEN) - gone <= names


def test_engines_read_the_right_rows_of_a_pruned_vocabulary(target, tmp_path):
    config, draft = make_draft(target)
    # Every row of the head says which target token it stands for.
    with torch.no_grad():
        draft.lm_head.weight[:] = draft.target_ids[:, None].float()
    export(draft, config, target, tmp_path / "out")

    tensors = load_file(tmp_path / "out" / "model.safetensors")

    hot_token_ids = tensors["d2t"] + torch.arange(W)
    assert len(set(tensors["d2t"].tolist())) > 2
    assert torch.equal(tensors["lm_head.weight"][:, 0].long(), hot_token_ids)
    assert torch.equal(tensors["t2d"].nonzero().flatten(), hot_token_ids)


@pytest.mark.parametrize("settings", [{}, {"draft_vocab_size": None}, {"fc_norm": True}])
def test_a_loaded_draft_computes_the_same_loss(target, tmp_path, settings):
    config, draft = make_draft(target, ttt_length=3, norm_output=True, **settings)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)

    loaded = load_draft(tmp_path / "out", target)

    ids = torch.randint(V, (12,))
    tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [torch.ones(12, dtype=torch.bool)])
    batch = FeatureBatch(tokens, Features(torch.randn(12, 3 * H), torch.randn(12, H)))
    context = StepContext(step=0, total_steps=1, num_loss_tokens=12)
    assert loaded(batch, context).loss.item() == draft(batch, context).loss.item()
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_of_an_export_replace_those_of_a_new_draft_with_its_vocabulary(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out", dtype=torch.float16)
    _, fresh = make_draft(target)
    load_weights(fresh, tmp_path / "out")
    assert torch.equal(fresh.d2t, draft.d2t)
    assert torch.equal(fresh.fc.weight, draft.fc.weight.half().float())


def test_config_says_what_sglang_vllm_and_transformers_read(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    target = make_target(tmp_path / "t", rope_parameters=None, rope_theta=2e4, rope_scaling=scaling)
    config, draft = make_draft(target, aux_layer_ids=[1, 3, 5], norm_output=True, ttt_length=4)
    export(draft, config, target, tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": H,
        "target_hidden_size": H,
        "intermediate_size": MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 2e4,
        "rope_scaling": scaling,
        "vocab_size": V,
        "draft_vocab_size": W,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "dtype": "bfloat16",
        "norm_output": True,
        "fc_norm": False,
        # SGLang: outputs of layers 1, 3, 5 from 0; vLLM: inputs of layers 2, 4, 6.
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
            "use_aux_hidden_state": True,
        },
        "eagle_aux_hidden_state_layer_ids": [2, 4, 6],
    }
    assert {key: contents[key] for key in expected} == expected
    assert contents["colospec"]["ttt_length"] == 4
    assert None not in (contents["rope_theta"], contents["rope_scaling"])
    parsed = LlamaConfig.from_pretrained(tmp_path / "out")
    assert parsed.rope_parameters["rope_theta"] == 2e4
    assert parsed.rope_parameters["factor"] == 2.0
    assert (parsed.head_dim, parsed.hidden_size) == (HEAD_DIM, H)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": None, "rope_theta": 3e4}, 3e4, None),
        ({"rope_parameters": None}, 1e4, None),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, LLAMA3),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            1e6,
            None,
        ),
    ],
)
def test_rope_is_the_targets_in_old_and_new_spelling(tmp_path, rope, theta, scaling):
    target = make_target(tmp_path / "t", **rope)
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (contents["rope_theta"], contents["rope_scaling"]) == (theta, scaling)
    parsed = LlamaConfig.from_pretrained(tmp_path / "out").rope_parameters
    expected = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    assert {key: parsed[key] for key in expected} == expected


def test_the_card_names_target_data_metrics_and_serve_commands(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "target-model" in card
    assert str(tmp_path) not in card
    assert "| steps | 7 |" in card
    assert "| data fingerprint | f00d/x |" in card
    assert "| metrics: train/loss | 1.25 |" in card
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path DRAFT" in card
    assert "--speculative-num-steps 3 --speculative-eagle-topk 1" in card
    assert '{"method": "eagle3", "model": "DRAFT", "num_speculative_tokens": 3}' in card


def test_a_draft_that_reads_the_last_layer_is_exported_with_a_warning(target, tmp_path, caplog):
    config, draft = make_draft(target, aux_layer_ids=[1, 3, LAYERS - 1])
    export(draft, config, target, tmp_path / "out")
    assert "which SGLang does not capture" in caplog.text
