"""Norm, MLP, plain layer and cache of drafts, and rows that are picked."""

import pytest
import torch
import torch.nn.functional as F

from colospec.draft.kv_cache import KVCache
from colospec.draft.layer import MLP, LayerShape, PlainLayer
from colospec.draft.norm import RMSNorm
from colospec.draft.rope import Rope, rotate
from colospec.draft.rows import pick, pick_each
from tests.draft.cases import make_target


def test_norm_equals_torch_with_gradients():
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(12, 1e-5).double()
    norm.weight.data = torch.randn(12, generator=generator, dtype=torch.float64)
    states = torch.randn(7, 12, generator=generator, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda s, _: norm(s), (states, norm.weight))
    torch.testing.assert_close(norm(states), F.rms_norm(states, (12,), norm.weight, 1e-5))


def test_norm_of_bfloat16_is_computed_in_float32():
    states = (torch.randn(50, 64) * 30).bfloat16()
    norm = RMSNorm(64, 1e-6).bfloat16()

    expected = F.rms_norm(states.double(), (64,), None, 1e-6)

    assert norm(states).dtype is torch.bfloat16
    torch.testing.assert_close(norm(states).double(), expected, rtol=2**-8, atol=0)


def test_mlp_equals_autograd():
    mlp = MLP(6, 10).double()
    states = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    leaves = (states, *mlp.parameters())

    found = mlp(states)
    plain = mlp.down_proj(F.silu(mlp.gate_proj(states)) * mlp.up_proj(states))

    torch.testing.assert_close(found, plain)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(plain.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def plain_heads(layer, normed, name, table=None):
    """Heads of one projection as autograd would make them, normed where the layer norms them."""
    attention = layer.self_attn
    heads = getattr(attention, f"{name}_proj")(normed).unflatten(1, (-1, attention.head_dim))
    if norm := getattr(attention, f"{name}_norm", None):
        heads = F.rms_norm(heads, (attention.head_dim,), norm.weight, norm.eps)
    return heads if table is None else rotate(heads, table)


@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 7])
def test_a_plain_layer_equals_autograd(head_norms, num_tokens):
    layer = PlainLayer(LayerShape(12, 20, 4, 2, 6, 1e-5), head_norms=head_norms).double()
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)
    table = Rope(make_target(head_dim=6)).table(torch.arange(num_tokens) + 3)
    states = torch.randn(num_tokens, 12, dtype=torch.float64, requires_grad=True)
    leaves = (states, *layer.parameters())

    def attend(query, key, value):
        heads = (part.transpose(0, 1) for part in (query, key, value))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return out.transpose(0, 1)

    found = layer(states, table, attend)
    normed = F.rms_norm(states, (12,), layer.input_layernorm.weight, 1e-5)
    query, key = (plain_heads(layer, normed, name, table) for name in "qk")
    value = plain_heads(layer, normed, "v")
    middle = states + layer.self_attn.o_proj(attend(query, key, value).flatten(1))
    mlp, weight = layer.mlp, layer.post_attention_layernorm.weight
    normed = F.rms_norm(middle, (12,), weight, 1e-5)
    plain = middle + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))

    torch.testing.assert_close(found, plain)
    grad = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(plain, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        layer.self_attn.keys_values(normed, table),
        (plain_heads(layer, normed, "k", table), plain_heads(layer, normed, "v")),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_rows_that_are_picked_get_their_own_gradients_and_the_others_none():
    steps = [torch.randn(9, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    rows = [torch.randperm(9)[:n] for n in (4, 0, 9)]

    found = pick_each(steps, torch.cat(rows), [len(part) for part in rows])

    expected = torch.cat([step[part] for step, part in zip(steps, rows, strict=True)])
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, steps, grad),
        torch.autograd.grad(expected, steps, grad),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(pick(steps[0], rows[0]), steps[0][rows[0]])


def test_cache_grows_and_forgets():
    cache, parts = KVCache(), torch.randn(300, 2, 4)
    for start in range(0, 300, 60):
        keys, values = cache.append(parts[start : start + 60], -parts[start : start + 60])
    assert torch.equal(keys, parts)
    assert torch.equal(values, -parts)

    cache.truncate(5)
    keys, _ = cache.append(parts[7:8], parts[7:8])

    assert torch.equal(keys, torch.cat([parts[:5], parts[7:8]]))
    assert cache.length == 6


def test_cache_cannot_be_truncated_to_more_than_it_holds():
    with pytest.raises(ValueError, match="0 tokens to 3"):
        KVCache().truncate(3)
