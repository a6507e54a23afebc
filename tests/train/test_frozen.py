"""The target's frozen weights reach all trainers, and one of them alone reads the files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from colospec.config import Weights
from colospec.target import Target
from colospec.train.frozen import share_frozen
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def write_target(directory, *, tied):
    config = {
        "hidden_size": 8, "num_hidden_layers": 3, "vocab_size": 10, "num_attention_heads": 2,
        "dtype": "bfloat16", "tie_word_embeddings": tied,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.randn(10, 8)}
    if not tied:
        tensors["lm_head.weight"] = torch.randn(10, 8)
    save_file(tensors, directory / "model.safetensors")
    return Target.load(directory), [
        tensor.bfloat16().float().tolist() for tensor in tensors.values()
    ]


def share(rank, target, weights):
    if rank != 0:  # this one would not find the files
        target = replace(target, path=target.path / "absent")
    embedding, head = share_frozen(target, weights, device=CPU, rank=rank, world_size=2)
    # As numbers: a tensor would go through the memory of a process that ends.
    return [None if tensor is None else tensor.float().tolist() for tensor in (embedding, head)]


@pytest.mark.parametrize("tied", [True, False])
def test_trainers_that_cannot_read_the_target_get_its_weights(tmp_path, tied):
    target, expected = write_target(tmp_path, tied=tied)
    for embedding, head in run_ranks(share, 2, target, Weights.pretrained):
        assert embedding == expected[0]
        assert head == (None if tied else expected[1])


def test_random_weights_are_equal_on_all_trainers_and_differ_from_each_other(tmp_path):
    target, _ = write_target(tmp_path, tied=False)
    first, second = run_ranks(share, 2, target, Weights.random)
    assert first == second
    assert first[0] != first[1]
    assert 0.01 < torch.tensor(first[0]).std() < 0.03
