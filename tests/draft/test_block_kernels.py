"""The kernels of block drafters under Triton's interpreter, against the plain path in float64.

Where there is a GPU, they run compiled in tests/gpu instead, unless TRITON_INTERPRET=1 is set.
"""

import os

import pytest
import torch

from colospec.draft.block_attention import block_attention
from colospec.draft.cross_entropy import head_cross_entropy
from colospec.draft.kernels import choice
from colospec.draft.norm import RMSNorm
from colospec.draft.rows import norm_rotate
from tests.draft.block_cases import corrected_losses, head_inputs, make_blocks, make_leaves
from tests.draft.cases import gradients, make_config, make_draft, make_inputs, make_target
from tests.draft.interpreter import mend
from tests.draft.numerics import agree, backward, error

if not torch.cuda.is_available():
    # Read when a kernel is defined, and the product imports none without a GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, which comes with torch for CUDA")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="compiled here: needs TRITON_INTERPRET=1"
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Use the kernels on the CPU, for all but float64; few programs, as each takes its time."""
    from colospec.draft.kernels import heads, norm

    mend(monkeypatch)
    for module in (heads, norm):
        monkeypatch.setattr(module, "NUM_PROGRAMS", 4)
    monkeypatch.setattr(choice, "fused", lambda tensor: tensor.dtype is not torch.float64)


@pytest.fixture
def seed():
    return torch.seed() % 2**31


def bound(dtype):
    """A few roundings of the type."""
    return 1e-5 if dtype is torch.float32 else 1.5e-2


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough for short documents to have several."""
    from colospec.draft.kernels import block_attention as forward
    from colospec.draft.kernels import block_attention_backward as backward

    tile = forward.Tile(rows=16, keys=16, num_warps=4, num_stages=1)
    for module in (forward, backward):
        monkeypatch.setattr(module, "fit", lambda *_: tile)
    monkeypatch.setattr(backward, "LANES", 8)
    monkeypatch.setattr(backward, "PROGRAMS", 7)


@pytest.mark.usefixtures("small_tiles")
# In bfloat16 the roundings of a few elements do not average out: single runs miss by 10 %.
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [([3], torch.float32), *(([1, 50, 2, 4, 21], dtype) for dtype in DTYPES)],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 2, 5, 40])
@pytest.mark.parametrize(
    ("size", "heads", "head_dim"), [(7, (4, 2), 16), (16, (3, 3), 24), (1, (5, 1), 8)], ids=str
)
def test_block_attention(seed, dtype, window, lengths, size, heads, head_dim):
    torch.manual_seed(seed)
    blocks = make_blocks(lengths, size=size, num_anchors=12, density=2.0)

    def attend(query, key, value, own_key, own_value):
        return block_attention(query, (key, value), (own_key, own_value), blocks, window=window)

    agree(attend, make_leaves(blocks, heads, head_dim, dtype), 2 * bound(dtype))


def test_block_attention_in_tiles_of_the_gpu(seed):
    torch.manual_seed(seed)
    blocks = make_blocks([150, 30], size=8, num_anchors=40)

    def attend(query, key, value, own_key, own_value):
        return block_attention(query, (key, value), (own_key, own_value), blocks, window=None)

    agree(attend, make_leaves(blocks, (4, 1), 16, torch.bfloat16), 3e-2)


def test_block_attention_without_blocks_gives_zero_gradients_to_the_context():
    blocks = make_blocks([9], size=4, num_anchors=3, density=0.0)
    leaves = make_leaves(blocks, (4, 2), 16, torch.float32)
    leaves[1], leaves[2] = torch.randn(5, 2, 16), torch.randn(5, 2, 16)

    found, grads = backward(
        lambda q, k, v, *own: block_attention(q, (k, v), own, blocks, window=None), leaves
    )

    assert found[0].shape == (0, 4, 16)
    assert not any(grad.any() for grad in grads)


def test_large_scores_stay_finite():
    blocks = make_blocks([40], size=4, num_anchors=9, density=2.0)
    leaves = make_leaves(blocks, (2, 2), 16, torch.float32)
    leaves[0] *= 300

    found, grads = backward(
        lambda q, k, v, *own: block_attention(q, (k, v), own, blocks, window=None), leaves
    )

    assert all(tensor.isfinite().all() for tensor in (*found, *grads))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("vocab_size", [1, 37, 4096, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(seed, dtype, vocab_size, gradients):
    torch.manual_seed(seed)
    # Products of small whole numbers are exact in every type, and often equal.
    hidden, head = (torch.randint(-2, 3, (n, 6)).to(dtype) for n in (23, vocab_size))
    labels = torch.randint(0, vocab_size, (23,))
    labels[:9] = (hidden[:9].double() @ head.double().T).argmax(-1)
    weights = torch.rand(23, dtype=torch.float32)

    def run(kind):
        leaf = hidden.detach().clone().to(kind).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            loss, right = head_cross_entropy(leaf, head.to(kind), labels, chunk_tokens=7)
        if gradients:
            (loss * weights).sum().backward()
        return loss.detach(), right, leaf.grad

    loss, right, grad = run(dtype)
    expected, wanted, exact = run(torch.float64)

    assert loss.dtype is torch.float32
    assert error(loss, expected) < 1e-5 or vocab_size == 1
    assert torch.equal(right, wanted)
    assert right[:9].all()
    if gradients:
        assert (grad.double() - exact).norm() <= bound(dtype) * exact.norm() + 1e-6


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("vocab_size", [1, 37, 4096, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("algorithm", "share"), [("dspark", 0.0), ("domino", 0.3), ("domino", 0.0), ("domino", 1.0)]
)
def test_losses_under_a_corrected_head(seed, algorithm, share, dtype, vocab_size, gradients):
    torch.manual_seed(seed)
    inputs = head_inputs(23, vocab_size, dtype)

    told, total, grads = corrected_losses(
        dtype, inputs, algorithm, gradients=gradients, share=share
    )

    known, exact, expected = corrected_losses(
        torch.float64, inputs, algorithm, gradients=gradients, share=share
    )
    assert total.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
    for ours, theirs in zip(told, known, strict=True):
        if ours.dtype is torch.bool:
            assert torch.equal(ours, theirs)
        else:
            assert ours.dtype is torch.float32
            assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=2e-5)
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype is dtype
        assert (ours.double() - theirs).norm() <= bound(dtype) * theirs.norm() + 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "half"), [(3, 8), (4, 3), (1, 4)], ids=str)
def test_norm_and_rotation_of_heads(seed, dtype, num_heads, half):
    torch.manual_seed(seed)
    norm, exact = RMSNorm(16, 1e-5).to(dtype), RMSNorm(16, 1e-5).double()
    norm.weight.data = torch.randn(16).to(dtype)
    exact.weight.data = norm.weight.data.double()
    angles = torch.randn(11, 1, half)
    table = 1.3 * angles.cos(), 1.3 * angles.sin()
    states = torch.randn(11, num_heads * 16).to(dtype)

    def call(module):
        return lambda leaf: norm_rotate(leaf, module, table)

    agree(call(norm), [states], bound(dtype), wide=call(exact))
    call(norm)(states).square().sum().backward()
    call(exact)(states.double()).square().sum().backward()
    assert error(norm.weight.grad, exact.weight.grad) < bound(dtype)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("dflash", {}),
        ("dflash", {"sliding_layers": [1], "sliding_window": 6}),
        ("dspark", {}),
        ("domino", {}),
    ],
)
@pytest.mark.parametrize("lengths", [[1, 9, 2, 30], [1], []], ids=str)
def test_the_whole_draft(seed, lengths, algorithm, settings):
    generator = torch.Generator().manual_seed(seed)
    target = make_target()
    config = make_config(algorithm, **settings)
    draft = make_draft(config, target, generator=generator, dtype=torch.float32)
    batch = make_inputs(lengths, config, target, generator=generator, dtype=torch.float32)

    terms, grads = gradients(draft, batch)

    exact, expected = gradients(draft.double(), batch)
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4, abs=1e-9)
    assert terms.denominator.item() == pytest.approx(exact.denominator.item(), rel=1e-6)
    for name, grad in grads.items():
        size = expected[name].norm().item()
        assert (grad.double() - expected[name]).norm().item() <= 1e-3 * size + 1e-6, name
