"""The Triton kernels under Triton's interpreter, on the CPU, against the plain path in float64.

Where there is a GPU, they run compiled in tests/gpu instead, unless TRITON_INTERPRET=1 is set.
"""

import os

import pytest
import torch

from colospec.batch import Cursor, TokenBatch
from colospec.draft import loss as loss_module
from colospec.draft.alignment import unroll
from colospec.draft.attention import Documents, ttt_attention
from colospec.draft.eagle3.config import Alignment
from colospec.draft.kernels import choice
from colospec.draft.layer import MLP, DraftLayer, LayerShape
from colospec.draft.loss import LossSettings, Teacher, fused_loss
from colospec.draft.norm import RMSNorm
from colospec.draft.rope import rotate, rotate_, rotate_back
from colospec.draft.settings import Loss
from tests.draft.cases import gradients, make_batch, make_config, make_draft, make_target
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
    """Use the kernels on the CPU, for all but float64."""
    monkeypatch.setattr(choice, "fused", lambda tensor: tensor.dtype is not torch.float64)


@pytest.fixture
def seed():
    return torch.seed() % 2**31


def bound(dtype):
    """A few roundings of the type."""
    return 1e-5 if dtype is torch.float32 else 1.5e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 16), (1, 5), (600, 24)], ids=str)
def test_norm(seed, dtype, shape):
    torch.manual_seed(seed)
    norm, exact = RMSNorm(shape[1], 1e-5).to(dtype), RMSNorm(shape[1], 1e-5).double()
    norm.weight.data = torch.randn(shape[1]).to(dtype)
    exact.weight.data = norm.weight.data.double()
    states = (3 * torch.randn(shape)).to(dtype)

    (found,), (grad,) = backward(norm, [states])
    (expected,), (exact_grad,) = backward(exact, [states.double()])

    assert error(found, expected) < bound(dtype)
    assert error(grad, exact_grad) < bound(dtype)
    norm(states).square().sum().backward()
    exact(states.double()).square().sum().backward()
    assert error(norm.weight.grad, exact.weight.grad) < bound(dtype)


def test_norm_of_a_slice_and_of_no_rows():
    norm, states = RMSNorm(8, 1e-5), torch.randn(9, 24)
    assert error(norm(states[:, 8:16]), norm(states[:, 8:16].contiguous())) < 1e-7

    empty = states[:0, :8].clone().requires_grad_()
    norm(empty).sum().backward()

    assert norm.weight.grad.abs().max() == 0
    assert empty.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp(seed, dtype):
    torch.manual_seed(seed)
    mlp, exact = MLP(6, 40).to(dtype), MLP(6, 40).double()
    exact.load_state_dict({name: w.double() for name, w in mlp.state_dict().items()})
    states = torch.randn(11, 6).to(dtype)

    agree(mlp, [states], bound(dtype), wide=exact)

    for module in (mlp, exact):
        module(states.to(next(module.parameters()).dtype)).sum().backward()
    for ours, theirs in zip(mlp.parameters(), exact.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [4, 8, 3])
def test_rotation_and_its_gradient(seed, dtype, half):
    torch.manual_seed(seed)
    states, angles = torch.randn(9, 3, 16).to(dtype), torch.randn(9, 1, half)
    table = 1.3 * angles.cos(), 1.3 * angles.sin()
    exact = states.double().requires_grad_()
    expected = rotate(exact, tuple(part.double() for part in table))
    grad = torch.randn(states.shape).to(dtype)
    expected.backward(grad.double())

    assert error(rotate_(states.clone(), table), expected.detach()) < bound(dtype)
    assert error(rotate_back(grad, table), exact.grad) < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_layer(seed, dtype, num_kv_heads):
    torch.manual_seed(seed)
    shape = LayerShape(12, 20, num_heads=6, num_kv_heads=num_kv_heads, head_dim=8, eps=1e-5)
    layer, exact = DraftLayer(shape).to(dtype), DraftLayer(shape).double()
    exact.load_state_dict({name: w.double() for name, w in layer.state_dict().items()})
    angles = torch.randn(10, 1, 4)
    borders = (0, 1, 6, 10)
    documents = Documents(borders, torch.tensor(borders, dtype=torch.int32))

    def run(module):
        def attend(query, key, value):
            return ttt_attention(query, [key, key * 0.5], [value, value * 2], documents)

        def call(embeds, hidden):
            return module(embeds, hidden, (angles.cos(), angles.sin()), attend)

        return call

    leaves = [torch.randn(10, 12).to(dtype) for _ in range(2)]
    agree(run(layer), leaves, 2 * bound(dtype), wide=run(exact))
    for module in (layer, exact):
        kind = next(module.parameters()).dtype
        run(module)(*(leaf.to(kind) for leaf in leaves)).square().sum().backward()
    for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 3 * bound(dtype), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("borders", [(0, 1), (0, 1, 2, 9, 30)], ids=str)
@pytest.mark.parametrize("num_diagonals", [1, 6])
@pytest.mark.parametrize(("heads", "size"), [((4, 4), 16), ((6, 2), 8), ((5, 1), 12)], ids=str)
def test_attention(seed, dtype, borders, num_diagonals, heads, size):
    torch.manual_seed(seed)
    documents = Documents(borders, torch.tensor(borders, dtype=torch.int32))
    steps = 1 + num_diagonals

    def attend(query, *rest):
        return ttt_attention(query, rest[:steps], rest[steps:], documents)

    leaves = [torch.randn(borders[-1], heads[0], size).to(dtype)]
    leaves += [torch.randn(borders[-1], heads[1], size).to(dtype) for _ in range(2 * steps)]
    agree(attend, leaves, 2 * bound(dtype))


def test_large_scores_stay_finite():
    documents = Documents((0, 6), torch.tensor([0, 6], dtype=torch.int32))
    leaves = [torch.randn(6, 2, 8) * scale for scale in (300.0, 1.0, 1.0, 1.0, 1.0)]

    found, grads = backward(lambda q, *r: ttt_attention(q, r[:2], r[2:], documents), leaves)

    assert all(tensor.isfinite().all() for tensor in (*found, *grads))


def loss_case(dtype, *, num_draft, vocab_size, tokens=24):
    masks = [torch.rand(n) < 0.8 for n in (tokens - 4, 1, 3)]
    ids = [torch.zeros(len(mask), dtype=torch.int64) for mask in masks]
    batch = TokenBatch.pack(Cursor(0, 0, 0), [0, 1, 2], ids, masks)
    rows = unroll(batch, ttt_length=3, alignment=Alignment.exact)
    kept = None if num_draft is None else torch.randperm(vocab_size)[:num_draft].sort().values
    teacher = Teacher(torch.randn(tokens, 8).to(dtype), torch.randn(vocab_size, 8).to(dtype), kept)
    hidden = torch.randn(sum(rows.sizes), 6).to(dtype)
    return hidden, torch.randn(num_draft or vocab_size, 6).to(dtype), teacher, rows


@pytest.mark.parametrize("kind", list(Loss))
@pytest.mark.parametrize(
    ("num_draft", "vocab_size"), [(None, 37), (None, 5000), (11, 37), (4500, 9000), (1, 37)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss(monkeypatch, seed, kind, num_draft, vocab_size, dtype):
    from colospec.draft.kernels import loss as loss_kernels

    monkeypatch.setattr(loss_kernels, "PIECE", 4000)
    torch.manual_seed(seed)
    hidden, weight, teacher, rows = loss_case(dtype, num_draft=num_draft, vocab_size=vocab_size)
    options = {
        "teacher": teacher,
        "rows": rows,
        "settings": LossSettings(kind, 3.0, (1.0, 0.8, 0.6), chunk_tokens=7),
    }
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    found = fused_loss(*leaves, **options)
    grads = torch.autograd.grad(found.loss, leaves)
    without = fused_loss(*(leaf.detach() for leaf in leaves), **options)

    # The plain path sees logits with the same rounding, so that likeliest tokens are the same.
    monkeypatch.setattr(choice, "fused", lambda _: False)
    plain = fused_loss(*leaves, **options)
    expected = torch.autograd.grad(plain.loss, leaves)

    assert error(found.loss, plain.loss) < 1e-5
    assert torch.equal(found.correct, plain.correct)
    assert error(found.acceptance, plain.acceptance) < 1e-5
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    assert all(error(*pair) < limit for pair in zip(grads, expected, strict=True))
    assert all(torch.equal(*pair) for pair in zip(without, found, strict=True))


@pytest.mark.parametrize("draft_vocab_size", [None, 30])
@pytest.mark.parametrize("lengths", [[1, 9, 2, 12], [1], []], ids=str)
def test_the_whole_draft(monkeypatch, seed, draft_vocab_size, lengths):
    monkeypatch.setitem(loss_module.MAX_ELEMENTS, "cpu", 300)
    generator = torch.Generator().manual_seed(seed)
    target = make_target()
    config = make_config(draft_vocab_size=draft_vocab_size, fc_norm=True)
    draft = make_draft(config, target, generator=generator, dtype=torch.float32)
    batch = make_batch(lengths, target, generator=generator, dtype=torch.float32)

    terms, grads = gradients(draft, batch, num_loss_tokens=9)

    exact, expected = gradients(draft.double(), batch, num_loss_tokens=9)
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4, abs=1e-9)
    for name, grad in grads.items():
        size = expected[name].norm().item()
        assert (grad.double() - expected[name]).norm().item() <= 1e-3 * size + 1e-6, name
