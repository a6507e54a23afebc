"""Finding and building draft models, and loading the target's frozen weights."""

import pytest
import torch
from safetensors.torch import save_file

from colospec.config import DraftConfig, Weights
from colospec.draft import registry
from colospec.target import Target
from tests.draft.cases import make_config, make_target


def write_target(directory, *, tied, rows=40):
    target = make_target(tied=tied)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(rows, 16, generator=generator),
        "lm_head.weight": torch.randn(rows, 16, generator=generator),
    }
    if tied:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    return Target.from_config(directory, target.hf_config), tensors


def test_an_unknown_algorithm_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"draft.algorithm=medusa is unknown.*dflash.*eagle3"):
        registry.features(DraftConfig(algorithm="medusa"), make_target())


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_come_from_the_target_and_stay_out_of_checkpoints(tmp_path, tied):
    target, tensors = write_target(tmp_path, tied=tied)

    draft = registry.build(make_config(), target, token_counts=None)

    assert torch.equal(draft.embedding, tensors["model.embed_tokens.weight"])
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    assert torch.equal(draft.frozen_head, head)
    assert not {"embedding", "target_head"} & set(draft.state_dict())
    assert not draft.embedding.requires_grad
    assert (draft.frozen_head is draft.embedding) is tied


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    target, _ = write_target(tmp_path, tied=False, rows=39)

    with pytest.raises(ValueError, match=r"\[39, 16\].*vocab_size=40"):
        registry.build(make_config(), target, token_counts=None)


def test_random_frozen_weights_are_the_same_everywhere_and_leave_the_generator_alone():
    torch.manual_seed(1)
    one = registry.build(make_config(), make_target(), token_counts=None, weights=Weights.random)
    after = torch.rand(1)
    torch.manual_seed(1)
    two = registry.build(make_config(), make_target(), token_counts=None, weights=Weights.random)

    assert torch.equal(one.frozen_head, two.frozen_head)
    assert not torch.equal(one.embedding, one.frozen_head)
    assert torch.equal(one.fc.weight, two.fc.weight)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("counts", [None, torch.ones(39)])
def test_a_pruned_vocabulary_needs_the_count_of_every_token(counts):
    config = make_config(draft_vocab_size=10)

    with pytest.raises(ValueError, match=r"draft_vocab_size=10.*40 tokens.*null"):
        registry.build(config, make_target(), token_counts=counts, weights=Weights.random)
