"""The compiled kernels of block drafters against the plain path in float64, and that they compile
once.

Float64 takes the plain path on the GPU too, so it is the reference there.
"""

import copy

import pytest
import torch

from colospec.batch import FeatureBatch, Features
from colospec.draft.block_attention import block_attention
from colospec.draft.cross_entropy import head_cross_entropy
from colospec.draft.kernels import choice
from colospec.draft.norm import RMSNorm
from colospec.draft.rows import norm_rotate
from tests.draft.block_cases import corrected_losses, head_inputs, make_blocks, make_leaves
from tests.draft.cases import context, make_config, make_draft, make_inputs, make_target
from tests.draft.numerics import agree, backward, error
from tests.gpu.machine import needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus(1)]

BF16 = torch.bfloat16
ROUNDINGS = 2**-7


@pytest.fixture
def seed():
    return torch.seed() % 2**31


def attend(blocks, window):
    def call(query, key, value, own_key, own_value):
        return block_attention(query, (key, value), (own_key, own_value), blocks, window=window)

    return call


def some_lengths(count, longest):
    return torch.randint(1, longest, (count,)).tolist()


@pytest.mark.parametrize(
    ("size", "num_anchors", "window", "heads", "head_dim", "dtype"),
    [
        (16, 512, None, (8, 2), 128, BF16),
        (16, 512, 300, (8, 2), 128, BF16),
        (1, 400, 5000, (8, 2), 128, BF16),
        (8, 20, 60, (4, 4), 64, BF16),
        (7, 400, None, (6, 2), 96, BF16),
        (150, 9, 2, (20, 1), 16, BF16),
        (16, 3, None, (2, 1), 256, BF16),
        (7, 400, 60, (4, 2), 64, torch.float32),
        (8, 400, None, (4, 2), 8, torch.float16),
    ],
    ids=str,
)
def test_block_attention(seed, size, num_anchors, window, heads, head_dim, dtype):
    torch.manual_seed(seed)
    lengths = [1, 600, 2, *some_lengths(3, 400)]
    blocks = make_blocks(lengths, size=size, num_anchors=num_anchors)
    blocks = blocks.to(torch.device("cuda"))
    leaves = make_leaves(blocks, heads, head_dim, dtype, device="cuda")

    agree(attend(blocks, window), leaves, 1e-5 if dtype is torch.float32 else 2 * ROUNDINGS)


def test_block_attention_of_the_8b_shape_and_that_it_repeats_itself(seed):
    torch.manual_seed(seed)
    blocks = make_blocks([2048, 700, 1, 33], size=16, num_anchors=512, density=2.0)
    blocks = blocks.to(torch.device("cuda"))
    leaves = make_leaves(blocks, (32, 8), 128, BF16, device="cuda")

    agree(attend(blocks, None), leaves, 2 * ROUNDINGS)

    found, again = (backward(attend(blocks, None), leaves) for _ in range(2))
    pairs = zip([*found[0], *found[1]], [*again[0], *again[1]], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_large_scores_stay_finite():
    blocks = make_blocks([300], size=16, num_anchors=90).to(torch.device("cuda"))
    leaves = make_leaves(blocks, (4, 2), 64, BF16, device="cuda")
    leaves[0] *= 300

    found, grads = backward(attend(blocks, None), leaves)

    assert all(tensor.isfinite().all() for tensor in (*found, *grads))


@pytest.mark.parametrize(("rows", "vocab_size"), [(300, 151_936), (1, 37), (41, 4097), (0, 9)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_cross_entropy(seed, monkeypatch, dtype, rows, vocab_size):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 64, device="cuda").to(dtype)
    head = (torch.randn(vocab_size, 64, device="cuda") * 0.3).to(dtype)
    labels = torch.randint(0, vocab_size, (rows,), device="cuda")
    labels[: rows // 2] = (hidden[: rows // 2].double() @ head.double().T).argmax(-1)
    weights = torch.rand(rows, device="cuda")

    def run(kind):
        leaf = hidden.to(kind, copy=True).requires_grad_()
        loss, right = head_cross_entropy(leaf, head.to(kind), labels, chunk_tokens=77)
        (grad,) = torch.autograd.grad((loss * weights).sum(), leaf)
        return loss.detach(), right, grad

    loss, right, grad = run(dtype)
    exact, _, exact_grad = run(torch.float64)
    monkeypatch.setattr(choice, "fused", lambda _: False)
    plain, expected, plain_grad = run(dtype)

    limit = 1e-5 if dtype is torch.float32 else 2 * ROUNDINGS
    assert loss.dtype is torch.float32
    assert error(loss, exact) < limit
    assert error(loss, plain) < 1e-5
    assert torch.equal(right, expected)
    assert error(grad, exact_grad) < limit
    assert error(grad, plain_grad) < limit


@pytest.mark.parametrize(("rows", "vocab_size"), [(300, 151_936), (1, 37), (41, 4097), (0, 9)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(("algorithm", "share"), [("dspark", 0.0), ("domino", 0.3)])
def test_losses_under_a_corrected_head(
    seed, monkeypatch, algorithm, share, dtype, rows, vocab_size
):
    torch.manual_seed(seed)
    inputs = head_inputs(rows, vocab_size, dtype, device="cuda", size=64, rank=16)

    told, total, grads = corrected_losses(dtype, inputs, algorithm, share=share)

    exact = corrected_losses(torch.float64, inputs, algorithm, share=share)
    monkeypatch.setattr(choice, "fused", lambda _: False)
    plain = corrected_losses(dtype, inputs, algorithm, share=share)
    limit = 1e-5 if dtype is torch.float32 else 2 * ROUNDINGS

    def close(ours, theirs, limit):
        # A label that is certain has no loss and no gradient to compare with.
        return (ours - theirs).double().norm() <= limit * theirs.double().norm() + 1e-4

    # The plain path in the same type has the very same logits.
    assert close(total, plain[1], 1e-5)
    assert close(total, exact[1], limit)
    for ours, theirs in zip(told, plain[0], strict=True):
        assert torch.equal(ours, theirs) if ours.dtype is torch.bool else close(ours, theirs, 1e-5)
    for ours, near, theirs in zip(grads, plain[2], exact[2], strict=True):
        assert ours.dtype is dtype
        assert close(ours, near, limit)
        assert close(ours, theirs, limit)


def test_logits_beyond_32_bit_offsets_are_reached(seed):
    from colospec.draft.kernels.cross_entropy import cross_entropy_

    torch.manual_seed(seed)
    logits = torch.zeros(14_200, 151_936, device="cuda", dtype=BF16)
    logits[-1] = torch.randn(151_936, device="cuda").to(BF16)
    last = logits[-1].double()
    labels = torch.full((14_200,), 151_935, device="cuda")
    loss = torch.empty(14_200, device="cuda")

    cross_entropy_(logits, labels, loss, torch.empty_like(loss, dtype=torch.bool), gradients=True)

    assert loss[-1].item() == pytest.approx((last.logsumexp(0) - last[-1]).item(), rel=1e-5)
    last = last.softmax(0)
    last[-1] -= 1
    assert error(logits[-1], last) < ROUNDINGS
    assert loss[0].item() == pytest.approx(11.9313, abs=1e-3)


@pytest.mark.parametrize(("num_heads", "size", "half"), [(32, 128, 64), (8, 128, 32), (3, 16, 3)])
def test_norm_and_rotation_of_heads(seed, num_heads, size, half):
    torch.manual_seed(seed)
    norm = RMSNorm(size, 1e-6).to("cuda", BF16)
    norm.weight.data = torch.randn(size, device="cuda").to(BF16)
    exact = copy.deepcopy(norm).double()
    angles = torch.randn(3000, 1, half, device="cuda")
    table = 1.3 * angles.cos(), 1.3 * angles.sin()
    states = torch.randn(3000, num_heads * size, device="cuda").to(BF16)

    def call(module):
        return lambda leaf: norm_rotate(leaf, module, table)

    agree(call(norm), [states], ROUNDINGS, wide=call(exact))
    call(norm)(states).square().sum().backward()
    call(exact)(states.double()).square().sum().backward()
    assert error(norm.weight.grad, exact.weight.grad) < 2 * ROUNDINGS


def test_windows_of_all_lengths_share_their_kernels():
    blocks = make_blocks([200], size=3, num_anchors=40).to(torch.device("cuda"))
    leaves = make_leaves(blocks, (4, 2), 64, BF16, device="cuda")
    backward(attend(blocks, 1), leaves)
    before = compiled()
    for window in (2, 16, 300, 4096):
        backward(attend(blocks, window), leaves)

    assert compiled() == before


def compiled():
    """How many variants of all kernels this process has compiled."""
    from colospec.draft.kernels import block_attention as forward
    from colospec.draft.kernels import block_attention_backward as back
    from colospec.draft.kernels import cross_entropy, heads, norm, swiglu

    functions = {
        id(value): value
        for module in (forward, back, cross_entropy, heads, norm, swiglu)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "device_caches")
    }
    assert len(functions) == 11
    return sum(len(cache[0]) for f in functions.values() for cache in f.device_caches.values())


@pytest.mark.parametrize("sliding", [{}, {"sliding_layers": [0], "sliding_window": 20}])
def test_other_lengths_and_anchors_compile_nothing_new(seed, sliding):
    generator = torch.Generator().manual_seed(seed)
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16)
    config = make_config("dflash", block_size=8, num_anchors=40, chunk_tokens=None, **sliding)
    draft = make_draft(config, target, generator=generator, dtype=BF16).cuda()

    def step(lengths):
        batch = make_inputs(lengths, config, target, generator=generator, dtype=BF16)
        aux = batch.features.aux_hidden_states.cuda()
        terms = draft(FeatureBatch(batch.tokens, Features(aux, None)), context())
        terms.loss.backward()

    step([40, 1, 70])
    before = compiled()
    for _ in range(20):
        count = int(torch.randint(1, 6, (), generator=generator))
        step(torch.randint(1, 200, (count,), generator=generator).tolist())
    step([3])
    step([1])
    step([])
    step([16, 16])

    assert compiled() == before
