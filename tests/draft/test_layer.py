"""Norm, MLP and cache of the draft's layer."""

import pytest
import torch
import torch.nn.functional as F

from colospec.draft.kv_cache import KVCache
from colospec.draft.layer import MLP, RMSNorm


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
