"""Facts about a target, from its directory alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from colospec.target import Target, missing_files

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "vocab_size": 10,
    "num_attention_heads": 2,
    "dtype": "float32",
}


def write(directory, tensors, **settings):
    (directory / "config.json").write_text(json.dumps({**CONFIG, **settings}))
    save_file(tensors, directory / "model.safetensors")
    return Target.load(directory)


def test_a_directory_without_a_model_says_what_to_set(tmp_path):
    with pytest.raises(ValueError, match=r"target\.path=.*no config\.json"):
        Target.load(tmp_path)


def test_missing_facts_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match="num_hidden_layers, vocab_size"):
        Target.load(tmp_path)


def test_the_head_of_tied_targets_is_the_embedding(tmp_path):
    weight = torch.randn(10, 8)
    target = write(tmp_path, {"model.embed_tokens.weight": weight}, tie_word_embeddings=True)
    assert torch.equal(target.load_head(), weight)
    assert torch.equal(target.load_embedding(), weight)


def test_the_text_part_inherits_what_stands_outside_it():
    config = {"text_config": CONFIG, "tie_word_embeddings": True, "eos_token_id": [1, 2]}
    target = Target.from_config("m", config)
    assert target.tied
    assert target.hf_config["eos_token_id"] == [1, 2]
    assert target.dtype is torch.float32


@pytest.mark.parametrize(
    "settings", [{"final_logit_softcapping": 30.0}, {"logit_scale": 0.06}, {"logits_scaling": 8}]
)
def test_heads_that_are_not_a_plain_product_are_refused(tmp_path, settings):
    target = write(tmp_path, {"lm_head.weight": torch.randn(10, 8)}, **settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        target.require_plain_head()


def test_a_head_with_a_bias_is_refused(tmp_path):
    tensors = {"lm_head.weight": torch.randn(10, 8), "lm_head.bias": torch.zeros(10)}
    with pytest.raises(ValueError, match=r"lm_head\.bias"):
        write(tmp_path, tensors).require_plain_head()


def test_a_snapshot_of_the_model_cache_has_the_name_of_its_repository():
    path = Path("/cache/hub/models--Qwen--Qwen3-8B/snapshots/0123abc")
    assert Target.from_config(path, CONFIG).name == "Qwen/Qwen3-8B"
    assert Target.from_config(Path("/models/mine"), CONFIG).name == "mine"


def test_files_that_an_interrupted_download_lacks_are_named(tmp_path):
    assert missing_files(tmp_path) == ["config.json", "model.safetensors"]
    write(tmp_path, {"lm_head.weight": torch.randn(10, 8)})
    assert missing_files(tmp_path) == []
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "one.safetensors").touch()
    assert missing_files(tmp_path) == ["two.safetensors"]
