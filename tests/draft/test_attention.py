"""TTT attention against softmax over an explicit mask in float64."""

import pytest
import torch

from colospec.draft.attention import Documents, ttt_attention

BORDERS = [(0, 1), (0, 7), (0, 1, 2, 9, 40), (0, 33, 34, 36)]


def explicit(query, keys, values, borders):
    """Concatenate the keys of all steps and mask: causal on step 0, diagonals after it."""
    num_tokens, num_heads, size = query.shape
    group = num_heads // keys[0].shape[1]
    document = torch.bucketize(torch.arange(num_tokens), torch.tensor(borders[1:]), right=True)
    causal = (document[:, None] == document) & torch.ones(num_tokens, num_tokens).tril().bool()
    mask = torch.cat([causal, *[torch.eye(num_tokens).bool()] * (len(keys) - 1)], dim=1)
    k = torch.cat(list(keys)).repeat_interleave(group, 1)
    v = torch.cat(list(values)).repeat_interleave(group, 1)
    scores = torch.einsum("qnd,knd->nqk", query, k) / size**0.5
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def make_inputs(borders, *, num_diagonals, num_heads, num_kv_heads, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def states(heads):
        shape = (borders[-1], heads, 16)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    query = states(num_heads)
    steps = 1 + num_diagonals
    return (
        query,
        [states(num_kv_heads) for _ in range(steps)],
        [states(num_kv_heads) for _ in range(steps)],
    )


def run(attention, query, keys, values, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (query, *keys, *values)]
    steps = len(keys)
    out = attention(leaves[0], leaves[1 : 1 + steps], leaves[1 + steps :])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("borders", BORDERS, ids=str)
@pytest.mark.parametrize("num_diagonals", [0, 1, 6])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 6e-2)],
    ids=str,
)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_output_and_gradients_equal_explicit_attention(
    borders, num_diagonals, dtype, tolerance, heads
):
    query, keys, values = make_inputs(
        borders,
        num_diagonals=num_diagonals,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        dtype=dtype,
        seed=len(borders),
    )
    documents = Documents(borders, torch.tensor(borders, dtype=torch.int32))
    grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grad = grad.to(dtype)

    found = run(lambda q, k, v: ttt_attention(q, k, v, documents), query, keys, values, grad)

    wide = [query.double(), [k.double() for k in keys], [v.double() for v in values]]
    expected = run(lambda q, k, v: explicit(q, k, v, borders), *wide, grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_gradients_equal_finite_differences():
    borders = (0, 1, 5, 7)
    query, keys, values = make_inputs(
        borders, num_diagonals=2, num_heads=4, num_kv_heads=2, dtype=torch.float64, seed=3
    )
    documents = Documents(borders, torch.tensor(borders, dtype=torch.int32))
    leaves = [tensor.requires_grad_() for tensor in (query, *keys, *values)]

    assert torch.autograd.gradcheck(
        lambda q, *rest: ttt_attention(q, rest[:3], rest[3:], documents), leaves
    )


def test_large_scores_stay_finite():
    borders = (0, 20)
    query, keys, values = make_inputs(
        borders, num_diagonals=3, num_heads=2, num_kv_heads=2, dtype=torch.float32, seed=4
    )
    documents = Documents(borders, torch.tensor(borders, dtype=torch.int32))

    out = run(lambda q, k, v: ttt_attention(q, k, v, documents), query * 300, keys, values, query)

    assert all(tensor.isfinite().all() for tensor in out)


def test_no_tokens_give_empty_gradients():
    query, keys, values = make_inputs(
        (0,), num_diagonals=2, num_heads=4, num_kv_heads=2, dtype=torch.float32, seed=0
    )
    documents = Documents((0,), torch.zeros(1, dtype=torch.int32))

    out = run(lambda q, k, v: ttt_attention(q, k, v, documents), query, keys, values, query)

    assert [tensor.shape[0] for tensor in out] == [0] * 8


def test_saves_no_copy_of_earlier_steps():
    borders = (0, 64)
    query, keys, values = make_inputs(
        borders, num_diagonals=5, num_heads=4, num_kv_heads=2, dtype=torch.float32, seed=1
    )
    documents = Documents(borders, torch.tensor(borders, dtype=torch.int32))
    leaves = [tensor.requires_grad_() for tensor in (query, *keys, *values)]
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ttt_attention(leaves[0], leaves[1:7], leaves[7:], documents)

    known = {tensor.data_ptr() for tensor in leaves}
    fresh = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert sum(tensor.numel() for tensor in fresh) == 64 * 4 * 16 + 64 * 4
