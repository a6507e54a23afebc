"""Rotary embedding in all spellings, against transformers' own Llama."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from colospec.draft.rope import Rope, rotate
from tests.draft.cases import make_target

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3,
        YARN,
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type", "nested"])
def test_rotation_equals_transformers(scaling, spelling):
    theta = 500.0
    old = {key: value for key, value in scaling.items() if key != "rope_type"}
    new = {**scaling, "rope_theta": theta}
    config = {
        "rope_parameters": {"rope_parameters": new, "rope_theta": None},
        "rope_scaling": {"rope_scaling": scaling},
        "type": {"rope_scaling": {**old, "type": scaling["rope_type"]}},
        "nested": {"rope_parameters": {"full_attention": new, "sliding_attention": {}}},
    }[spelling]
    target = make_target(**config)
    reference = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=16,
            num_attention_heads=4,
            head_dim=8,
            max_position_embeddings=512,
            rope_parameters=new,
        )
    )
    positions = torch.randint(0, 500, (30,), generator=torch.Generator().manual_seed(0))
    states = torch.randn(30, 4, 8, generator=torch.Generator().manual_seed(1))

    found = rotate(states, Rope(target).table(positions))

    cos, sin = reference(states, positions[None])
    expected, _ = apply_rotary_pos_emb(*[states.transpose(0, 1)[None]] * 2, cos, sin)
    torch.testing.assert_close(found, expected[0].transpose(0, 1))


@pytest.mark.parametrize("missing", [{}, {"rope_scaling": None}, {"rope_parameters": None}])
def test_a_missing_form_is_the_default_one(missing):
    positions = torch.arange(9)

    found = Rope(make_target(**missing)).table(positions)

    frequencies = 500.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(found[0].squeeze(1), (positions[:, None] * frequencies).cos())
    torch.testing.assert_close(found[1].squeeze(1), (positions[:, None] * frequencies).sin())


def test_partial_rotation_leaves_the_rest_of_the_head():
    target = make_target(partial_rotary_factor=0.5)
    states = torch.randn(5, 4, 8)

    found = rotate(states, Rope(target).table(torch.arange(5)))

    assert torch.equal(found[..., 4:], states[..., 4:])
    assert not torch.equal(found[1:, :, :4], states[1:, :, :4])


def test_an_unknown_form_is_refused_with_the_known_ones():
    target = make_target(rope_scaling={"rope_type": "spiral", "factor": 2.0})

    with pytest.raises(ValueError, match=r"rope_type=spiral.*default.*llama3, yarn"):
        Rope(target)
