"""The compiled Triton kernels against the plain path in float64, and that they compile once.

Float64 takes the plain path on the GPU too, so it is the reference there.
"""

import copy

import pytest
import torch

from colospec.batch import Cursor, TokenBatch
from colospec.draft.alignment import unroll
from colospec.draft.attention import Documents, ttt_attention
from colospec.draft.eagle3.config import Alignment
from colospec.draft.kernels import choice
from colospec.draft.layer import MLP
from colospec.draft.loss import LossSettings, Teacher, fused_loss
from colospec.draft.norm import RMSNorm
from colospec.draft.rope import rotate, rotate_, rotate_back
from colospec.draft.settings import Loss
from tests.draft.cases import context, make_batch, make_config, make_draft, make_target
from tests.draft.numerics import agree, backward, error
from tests.draft.test_attention import explicit
from tests.gpu.machine import needs_gpus
from tests.gpu.test_draft import on_gpu

pytestmark = [pytest.mark.gpu, needs_gpus(1)]

BF16 = torch.bfloat16
# Inputs are exact and one rounding of the result is 2^-9 of each element; sums keep float32, and
# two or three roundings in a row stay below 2^-7 of the norm.
ROUNDINGS = 2**-7


@pytest.fixture
def seed():
    return torch.seed() % 2**31


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def compare_modules(module, states):
    exact = copy.deepcopy(module).double()
    agree(module, [states], ROUNDINGS, wide=exact)
    for one in (module, exact):
        one(states.to(next(one.parameters()).dtype)).square().sum().backward()
    for ours, theirs in zip(module.parameters(), exact.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 2 * ROUNDINGS


@pytest.mark.parametrize("shape", [(2000, 4096), (1, 2560), (700, 24), (0, 64)], ids=str)
def test_norm(seed, shape):
    torch.manual_seed(seed)
    norm = RMSNorm(shape[1], 1e-6).to("cuda", BF16)
    norm.weight.data = normal(shape[1])
    compare_modules(norm, 3 * normal(*shape))


def test_norm_of_a_slice_is_that_of_its_copy(seed):
    torch.manual_seed(seed)
    norm, states = RMSNorm(512, 1e-6).to("cuda", BF16), normal(300, 3 * 512)
    part = states[:, 512:1024]

    assert torch.equal(norm(part), norm(part.contiguous()))


@pytest.mark.parametrize(("rows", "width"), [(1000, 12288), (1, 24), (37, 5000), (0, 8)], ids=str)
def test_mlp(seed, rows, width):
    torch.manual_seed(seed)
    compare_modules(MLP(64, width).to("cuda", BF16), normal(rows, 64))


@pytest.mark.parametrize(("heads", "size", "half"), [(32, 128, 64), (8, 128, 32), (3, 16, 3)])
def test_rotation_and_its_gradient(seed, heads, size, half):
    torch.manual_seed(seed)
    states, grad = normal(777, heads, size), normal(777, heads, size)
    angles = normal(777, 1, half, dtype=torch.float32)
    table = 1.3 * angles.cos(), 1.3 * angles.sin()
    exact = states.double().requires_grad_()
    expected = rotate(exact, tuple(part.double() for part in table))
    expected.backward(grad.double())

    assert error(rotate_(states.clone(), table), expected.detach()) < ROUNDINGS
    assert error(rotate_back(grad, table), exact.grad) < ROUNDINGS


@pytest.mark.parametrize("num_diagonals", [1, 6])
@pytest.mark.parametrize(
    ("heads", "size"), [((32, 8), 128), ((4, 4), 64), ((6, 2), 96), ((5, 1), 16)], ids=str
)
def test_attention(seed, num_diagonals, heads, size):
    torch.manual_seed(seed)
    borders = (0, 1, 2, 200, 201, 333)
    documents = Documents(borders, torch.tensor(borders, dtype=torch.int32, device="cuda"))
    steps = 1 + num_diagonals
    leaves = [normal(333, heads[0], size)]
    leaves += [normal(333, heads[1], size) for _ in range(2 * steps)]

    def exact(query, *rest):
        with torch.device("cuda"):
            return explicit(query, rest[:steps], rest[steps:], borders)

    # Flash attention rounds probabilities to bfloat16.
    agree(
        lambda query, *rest: ttt_attention(query, rest[:steps], rest[steps:], documents),
        leaves,
        2 * ROUNDINGS,
        wide=exact,
    )


def loss_case(*, num_draft, vocab_size, lengths, size=64):
    """A teacher with one clear favourite per row, in four of five cases sayable by the draft:
    differently rounded logits of a flat teacher would have different favourites."""
    masks = [torch.rand(n) < 0.8 for n in lengths]
    ids = [torch.zeros(n, dtype=torch.int64) for n in lengths]
    batch = TokenBatch.pack(Cursor(0, 0, 0), range(len(lengths)), ids, masks)
    rows = unroll(batch, ttt_length=3, alignment=Alignment.exact).to(torch.device("cuda"))
    head = normal(vocab_size, size)
    kept, favourites = None, torch.randint(0, vocab_size, (batch.num_tokens,), device="cuda")
    if num_draft is not None:
        kept = torch.randperm(vocab_size, device="cuda")[:num_draft].sort().values
        sayable = kept[torch.randint(0, num_draft, (batch.num_tokens,), device="cuda")]
        favourites = sayable.where(torch.rand(batch.num_tokens, device="cuda") < 0.8, favourites)
    last = (head[favourites] * 0.3).to(BF16) + normal(batch.num_tokens, size) * 0.02
    hidden = normal(sum(rows.sizes), size)
    weight = (normal(num_draft or vocab_size, size) * 0.2).to(BF16)
    return hidden, weight, Teacher(last, head, kept), rows


def run_loss(hidden, weight, teacher, rows, kind, chunk_tokens):
    settings = LossSettings(kind, 3.0, (1.0, 0.8, 0.6), chunk_tokens)
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    sums = fused_loss(*leaves, teacher=teacher, rows=rows, settings=settings)
    return sums, torch.autograd.grad(sums.loss * 0.01, leaves)


@pytest.mark.parametrize("kind", list(Loss))
@pytest.mark.parametrize(
    ("num_draft", "vocab_size"),
    [(None, 151_936), (32_000, 151_936), (11, 37), (None, 37), (1, 70_001)],
    ids=str,
)
def test_loss(monkeypatch, seed, kind, num_draft, vocab_size):
    torch.manual_seed(seed)
    case = loss_case(num_draft=num_draft, vocab_size=vocab_size, lengths=[1, 120, 2, 1, 61])

    sums, grads = run_loss(*case, kind, 50)
    again, same = run_loss(*case, kind, 50)
    monkeypatch.setattr(choice, "fused", lambda _: False)
    plain, expected = run_loss(*case, kind, None)
    hidden, weight, teacher, rows = case
    exact_teacher = Teacher(teacher.last.double(), teacher.head.double(), teacher.target_ids)
    exact, _ = run_loss(hidden.double(), weight.double(), exact_teacher, rows, kind, None)

    # Float32 cannot tell the loss of a row from zero below 1e-5.
    noise = 1e-5 * len(hidden)
    assert sums.loss.item() == pytest.approx(plain.loss.item(), rel=2e-3, abs=noise)
    # Logits of bfloat16 carry 8 bits, and where one token can be said nothing averages them out.
    assert sums.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2, abs=noise)
    assert (sums.correct - plain.correct).abs().max() <= 2
    assert error(sums.acceptance, plain.acceptance) < 2e-3
    # A rounded probability can cross the target's, where the gradient of acceptance jumps.
    limit = 2e-2 if kind is Loss.kl else 5e-2
    assert all(error(*pair) < limit for pair in zip(grads, expected, strict=True))
    assert all(torch.equal(*pair) for pair in zip(sums, again, strict=True))
    assert all(torch.equal(*pair) for pair in zip(grads, same, strict=True))


def test_rows_beyond_32_bit_offsets_are_reached(seed):
    """R * W and C * W above 2^31."""
    from colospec.draft.kernels import loss as kernels

    torch.manual_seed(seed)
    columns, num_rows = 151_936, 14_200
    logits = torch.zeros(num_rows, columns, device="cuda", dtype=BF16)
    logits[-1] = normal(columns)
    teacher = torch.zeros_like(logits)
    teacher[-1] = normal(columns)
    scan = kernels._Scan(teacher)
    scan.add(teacher, 0)
    target = kernels.TeacherRows(
        teacher, scan.norm(), scan.norm(), scan.token, torch.ones_like(scan.top), None
    )
    slots, terms = torch.arange(num_rows, device="cuda"), scan.top.new_empty(3, num_rows)
    q, p = logits[-1].double().softmax(-1), teacher[-1].double().softmax(-1)

    step = kernels.StepSettings(Loss.kl, 3.0, 1.0, 1e-8)
    kernels.compare(logits, target, (slots, 0, 0), terms, step, gradients=True)

    assert scan.token[-1] == p.argmax()
    assert terms[0, -1].item() == pytest.approx(-(p * q.log()).sum().item(), rel=1e-5)
    assert terms[2, -1].item() == pytest.approx(torch.minimum(p, q).sum().item(), rel=1e-5)
    assert error(logits[-1], q - p) < ROUNDINGS
    assert logits[:-1].abs().max() == 0


def compiled():
    """How many variants of all kernels this process has compiled."""
    from colospec.draft.kernels import attention, loss, norm, rope, swiglu

    functions = [
        value
        for module in (attention, loss, norm, rope, swiglu)
        for value in vars(module).values()
        if hasattr(value, "device_caches")
    ]
    assert len(functions) >= 10
    return sum(len(cache[0]) for f in functions for cache in f.device_caches.values())


@pytest.mark.parametrize("draft_vocab_size", [None, 300])
def test_random_lengths_compile_nothing_new(seed, draft_vocab_size):
    generator = torch.Generator().manual_seed(seed)
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16)
    config = make_config(draft_vocab_size=draft_vocab_size, chunk_tokens=None, fc_norm=True)
    draft = make_draft(config, target, generator=generator, dtype=BF16).cuda()

    def step(lengths):
        batch = make_batch(lengths, target, generator=generator)
        draft(on_gpu(batch, BF16), context(80)).loss.backward()

    step([40, 1, 70])
    before = compiled()
    for _ in range(20):
        count = int(torch.randint(1, 6, (), generator=generator))
        step(torch.randint(1, 200, (count,), generator=generator).tolist())
    step([1])
    step([])
    step([16])

    assert compiled() == before


def test_large_scores_stay_finite():
    documents = Documents((0, 64), torch.tensor([0, 64], dtype=torch.int32, device="cuda"))
    leaves = [normal(64, 4, 64) * 300, *(normal(64, 4, 64) for _ in range(4))]

    found, grads = backward(lambda q, *r: ttt_attention(q, r[:2], r[2:], documents), leaves)

    assert all(tensor.isfinite().all() for tensor in (*found, *grads))
