"""Exports in the layout of speculators, which vLLM serves: keys, names, layer ids, round trips.

The lists are those that speculators 0.9.0 (models/eagle3, models/dflash) and vLLM 0.33.0
(transformers_utils/configs/speculators, model_executor/models/llama_eagle3.py, qwen3_dflash.py)
read.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen3Config

from colospec.checkpoint.export import load_draft
from colospec.config import ExportFormat
from tests.checkpoint import exports as eagle3
from tests.checkpoint import test_dflash_export as dflash
from tests.checkpoint import test_dspark_export as dspark
from tests.checkpoint import test_peagle_export as peagle
from tests.checkpoint.exports import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    MLP,
    H,
    V,
    W,
    export,
    make_target,
)

SPECULATORS = ExportFormat.speculators
MAKERS = {
    "eagle3": eagle3.make_draft,
    "dflash": dflash.make_draft,
    "dspark": dspark.make_draft,
    "peagle": peagle.make_draft,
}
GOLDEN = {
    "eagle3": {name.replace("midlayer.", "layers.0."): s for name, s in eagle3.GOLDEN.items()},
    "dflash": dflash.GOLDEN,
    "dspark": {
        **dflash.GOLDEN,
        "markov_head.markov_w1.weight": [V, dspark.R],
        "markov_head.markov_w2.weight": [V, dspark.R],
        "confidence_head.proj.weight": [1, H + dspark.R],
        "confidence_head.proj.bias": [1],
    },
    "peagle": peagle.GOLDEN | {"lm_head.weight": [W, H], "d2t": [W], "t2d": [V]},
}


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "target-model", architectures=["Qwen3ForCausalLM"])


def exported(kind, target, directory, **settings):
    """Export a fresh draft; return it and the contents of config.json."""
    config, draft = MAKERS[kind](target, **settings)
    export(draft, config, target, directory, format=SPECULATORS)
    return draft, json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("kind", MAKERS)
def test_names_and_shapes_are_those_of_speculators(target, tmp_path, kind):
    exported(kind, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == GOLDEN[kind]


LAYER = {
    "hidden_size": H,
    "target_hidden_size": H,
    "intermediate_size": MLP,
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
}


def shared(kind, target, num_tokens):
    return {
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": num_tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": str(target.path),
                "architectures": ["Qwen3ForCausalLM"],
            },
        },
        "tie_word_embeddings": False,
        "target_hidden_size": H,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def test_an_eagle3_config_has_every_key_that_is_read(target, tmp_path):
    _, contents = exported("eagle3", target, tmp_path / "out", aux_layer_ids=[1, 3, 4, 6])
    assert contents.pop("colospec")["ttt_length"] == 7
    assert contents == {
        **shared("eagle3", target, 3),
        "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": {
            "model_type": "llama",
            "num_hidden_layers": 1,
            # vLLM takes 3 where it is missing.
            "num_aux_hidden_states": 4,
            **LAYER,
        },
        "draft_vocab_size": W,
        "norm_before_fc": False,
        # vLLM takes true where it is missing.
        "norm_before_residual": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
        # Inputs of layers, from 0.
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5, 7],
    }
    layer = LlamaConfig(**contents["transformer_layer_config"])
    assert (layer.head_dim, layer.rope_parameters["rope_theta"]) == (HEAD_DIM, 5e5)


def test_a_dflash_config_has_every_key_that_is_read(target, tmp_path):
    _, contents = exported(
        "dflash", target, tmp_path / "out", aux_layer_ids=[0, 3, 5], mask_token_id=3
    )
    assert contents.pop("colospec")["num_anchors"] == 9
    assert contents == {
        **shared("dflash", target, 4),
        "architectures": ["DFlashSpeculator"],
        "transformer_layer_config": {
            **LAYER,
            "model_type": "qwen3",
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "full_attention"],
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 2,
        },
        "draft_vocab_size": V,
        "block_size": 5,
        "mask_token_id": 3,
        "aux_hidden_state_layer_ids": [1, 4, 6],
        "sliding_window_non_causal": True,
        "sample_from_anchor": False,
    }
    layer = Qwen3Config(**contents["transformer_layer_config"])
    assert layer.layer_types == ["full_attention", "full_attention"]


def test_a_dspark_config_is_that_of_dflash_and_its_heads(target, tmp_path):
    _, contents = exported("dspark", target, tmp_path / "out", mask_token_id=3)
    _, other = exported("dflash", target, tmp_path / "other", mask_token_id=3)
    different = {key: contents[key] for key in contents if contents[key] != other.get(key)}
    methods = different.pop("speculators_config")["proposal_methods"]
    assert [method["speculative_tokens"] for method in methods] == [5]
    assert different == {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        # The slot of the given token drafts too.
        "sample_from_anchor": True,
        "markov_rank": dspark.R,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    assert other.keys() <= contents.keys()


def test_a_peagle_config_is_that_of_eagle3_and_its_mask(target, tmp_path):
    _, contents = exported("peagle", target, tmp_path / "out", mask_token_id=3)
    _, other = exported("eagle3", target, tmp_path / "other")
    different = {key: contents[key] for key in contents if contents[key] != other.get(key)}
    methods = different.pop("speculators_config")["proposal_methods"]
    assert [method["speculative_tokens"] for method in methods] == [5]
    assert different.pop("transformer_layer_config")["num_hidden_layers"] == 2
    assert different.pop("colospec")["num_depths"] == 5
    assert different == {
        "architectures": ["PEagleSpeculator"],
        "speculators_model_type": "peagle",
        "mask_token_id": 3,
    }


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_a_head_that_vllm_does_not_have_is_refused(target, tmp_path, kind):
    head = dspark.MarkovHeadType(kind)
    with pytest.raises(ValueError, match=f"markov_head_type={kind}, only vanilla"):
        exported("dspark", target, tmp_path / "out", markov_head_type=head)


@pytest.mark.parametrize(("sliding", "causal"), [([], False), ([0, 1], True)])
def test_vllm_masks_the_block_as_it_was_trained(target, tmp_path, sliding, causal):
    settings = {"sliding_layers": sliding, "sliding_window": 4 if sliding else None}
    _, contents = exported("dflash", target, tmp_path / "out", **settings)
    # vLLM 0.33: one answer for all layers, whatever their types are; missing means true.
    assert contents["sliding_window_non_causal"] is not causal


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_a_draft_that_vllm_would_mask_wrongly_is_refused(target, tmp_path, kind):
    with pytest.raises(ValueError, match=r"sliding_layers=\[1\] of 2 layers.*format=sglang"):
        exported(kind, target, tmp_path / "out", sliding_layers=[1], sliding_window=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ExportFormat)
@pytest.mark.parametrize("kind", MAKERS)
def test_export_import_export_is_bit_equal_in_every_format(target, tmp_path, kind, form, dtype):
    config, draft = MAKERS[kind](target)
    export(draft, config, target, tmp_path / "one", format=form, dtype=dtype)
    loaded = load_draft(tmp_path / "one", target)
    export(loaded, loaded.config, target, tmp_path / "two", format=form, dtype=dtype)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    dtypes = {t.dtype for t in load_file(tmp_path / "two" / "model.safetensors").values()}
    assert dtypes - {torch.bool, torch.int64} == {dtype}


@pytest.mark.parametrize("kind", MAKERS)
def test_both_formats_stand_for_the_same_draft(target, tmp_path, kind):
    config, draft = MAKERS[kind](target, aux_layer_ids=[0, 2, 5])
    drafts = []
    for form in ExportFormat:
        export(draft, config, target, tmp_path / form.value, format=form, dtype=torch.float32)
        drafts.append(load_draft(tmp_path / form.value, target))
    one, two = drafts
    assert one.config == two.config
    assert one.config.aux_layer_ids == [0, 2, 5]
    for name, tensor in draft.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name
        assert torch.equal(two.state_dict()[name], tensor), name


def test_pruned_rows_are_the_targets_rows_of_their_tokens(target, tmp_path):
    # A fresh draft's head starts from the target's: the file must say which rows those were.
    exported("eagle3", target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ids = tensors["d2t"] + torch.arange(W)
    assert not torch.equal(ids, tensors["d2t"]), "offsets and ids differ"
    head = target.load_head().to(torch.bfloat16)
    assert torch.equal(tensors["lm_head.weight"], head[ids])
    assert not torch.equal(tensors["lm_head.weight"], head[tensors["d2t"]])
    assert torch.equal(tensors["t2d"].nonzero().flatten(), ids)


@pytest.mark.parametrize(
    ("kind", "change", "complaint"),
    [
        ("eagle3", {"norm_before_fc": True}, "norm_before_fc=true"),
        ("eagle3", {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}, "include 0, the embedding"),
        ("dflash", {"sample_from_anchor": True}, "sample_from_anchor=True"),
        ("dspark", {"sample_from_anchor": False}, "sample_from_anchor=False"),
        ("dflash", {"aux_hidden_state_layer_ids": [0, 2, 4]}, "include 0, the embedding"),
        ("dflash", {"speculators_model_type": "other"}, "speculators_model_type=other"),
    ],
)
def test_what_computes_something_else_is_refused(target, tmp_path, kind, change, complaint):
    _, contents = exported(kind, target, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(contents | change))
    with pytest.raises(ValueError, match=complaint):
        load_draft(tmp_path / "out", target)


def test_a_config_without_norm_before_residual_means_what_it_means_to_vllm(target, tmp_path):
    _, contents = exported("eagle3", target, tmp_path / "out", norm_before_residual=True)
    assert contents.pop("norm_before_residual") is True
    (tmp_path / "out" / "config.json").write_text(json.dumps(contents))
    assert load_draft(tmp_path / "out", target).config.norm_before_residual


def test_a_norm_before_the_residual_is_not_exported_where_sglang_would_ignore_it(target, tmp_path):
    config, draft = eagle3.make_draft(target, norm_before_residual=True)
    with pytest.raises(ValueError, match=r"norm_before_residual=true.*format=speculators"):
        export(draft, config, target, tmp_path / "out")


@pytest.mark.parametrize(("kind", "tokens"), [("eagle3", 3), ("dflash", 4), ("dspark", 5)])
def test_the_card_serves_with_vllm_alone(tmp_path, kind, tokens):
    for path, by_name in (("models--org--name/snapshots/1", True), ("local", False)):
        (tmp_path / path).mkdir(parents=True)
        target = make_target(tmp_path / path)
        _, contents = exported(kind, target, tmp_path / f"out-{by_name}")
        card = (tmp_path / f"out-{by_name}" / "README.md").read_text()
        assert f'"method": "{kind}", "model": "DRAFT", "num_speculative_tokens": {tokens}' in card
        assert "sglang" not in card.split("## Serve")[1].lower()
        # vLLM looks a target up that is named as a repository, and refuses a path.
        assert ("vllm serve DRAFT\n" in card) is by_name
        name = contents["speculators_config"]["verifier"]["name_or_path"]
        assert name == ("org/name" if by_name else str(tmp_path / "local"))
