"""The fused head and loss against plain autograd over all logits."""

import pytest
import torch

from colospec.batch import Cursor, TokenBatch
from colospec.draft import loss as module
from colospec.draft.alignment import unroll
from colospec.draft.eagle3.config import Alignment
from colospec.draft.loss import LossSettings, Teacher, fused_loss
from colospec.draft.settings import Loss
from tests.draft.oracle import plain_loss

STEPS = 3


def make_case(seed, *, num_draft, dtype, vocab_size=37, tokens=30, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = TokenBatch.pack(
        Cursor(0, 0, 0),
        [0, 1, 2],
        [torch.zeros(n, dtype=torch.int64) for n in (tokens - 8, 3, 5)],
        [torch.rand(n, generator=generator) < 0.8 for n in (tokens - 8, 3, 5)],
    )
    rows = unroll(batch, ttt_length=STEPS, alignment=Alignment.exact)
    ids = None
    if num_draft is not None:
        ids = torch.randperm(vocab_size, generator=generator)[:num_draft].sort().values
    teacher = Teacher(normal(tokens, 8), normal(vocab_size, 8), ids)
    hidden = normal(sum(rows.sizes), 6).mul_(scale).requires_grad_()
    weight = normal(num_draft or vocab_size, 6).requires_grad_()
    return hidden, weight, teacher, rows


def plain(hidden, weight, teacher, rows, kind):
    """All logits at once, in the type of the inputs."""
    z = teacher.last @ teacher.head.T
    total, correct, acceptance = 0.0, [], []
    parts = zip(hidden.split(rows.sizes), rows.slots.split(rows.sizes), strict=True)
    for step, (states, slots) in enumerate(parts):
        loss, alpha, hits = plain_loss(
            states @ weight.T,
            z[rows.teacher_rows[slots]],
            target_ids=teacher.target_ids,
            kind=kind.value,
            eta=3.0,
        )
        total = total + 0.8**step * loss.sum()
        correct.append(hits.sum())
        acceptance.append(alpha.sum())
    return total, torch.stack(correct), torch.stack(acceptance)


def settings(kind, chunk_tokens=4):
    weights = tuple(0.8**step for step in range(STEPS))
    return LossSettings(kind=kind, lk_eta=3.0, step_weights=weights, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("kind", list(Loss))
@pytest.mark.parametrize("num_draft", [None, 1, 11, 36])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_sums_and_gradients_equal_plain_autograd(kind, num_draft, chunk_tokens):
    hidden, weight, teacher, rows = make_case(
        chunk_tokens, num_draft=num_draft, dtype=torch.float64
    )

    found = fused_loss(
        hidden, weight, teacher=teacher, rows=rows, settings=settings(kind, chunk_tokens)
    )
    grads = torch.autograd.grad(found.loss * 0.37, (hidden, weight))

    total, correct, acceptance = plain(hidden, weight, teacher, rows, kind)
    expected = torch.autograd.grad(total * 0.37, (hidden, weight))
    torch.testing.assert_close(found.loss, total, rtol=1e-11, atol=1e-11)
    assert torch.equal(found.correct, correct.double())
    torch.testing.assert_close(found.acceptance, acceptance)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [Loss.kl, Loss.lk_alpha])
def test_gradients_equal_finite_differences(kind):
    hidden, weight, teacher, rows = make_case(2, num_draft=15, dtype=torch.float64)
    options = {"teacher": teacher, "rows": rows, "settings": settings(kind)}
    loss = fused_loss(hidden, weight, **options).loss
    grads = torch.autograd.grad(loss, (hidden, weight))
    generator = torch.Generator().manual_seed(0)

    for _ in range(5):
        along = [torch.randn(t.shape, generator=generator).double() for t in (hidden, weight)]
        with torch.no_grad():
            up, down = (
                fused_loss(hidden + e * along[0], weight + e * along[1], **options).loss
                for e in (1e-6, -1e-6)
            )
        slope = sum((g * a).sum() for g, a in zip(grads, along, strict=True))
        assert slope.item() == pytest.approx((up - down).item() / 2e-6, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("num_draft", [None, 11])
def test_blocks_of_the_vocabulary_do_not_change_the_result(monkeypatch, num_draft):
    hidden, weight, teacher, rows = make_case(1, num_draft=num_draft, dtype=torch.float64)
    options = {"teacher": teacher, "rows": rows, "settings": settings(Loss.kl, 8)}
    whole = fused_loss(hidden, weight, **options)
    expected = torch.autograd.grad(whole.loss, (hidden, weight))

    monkeypatch.setitem(module.MAX_ELEMENTS, "cpu", 40)
    blocked = fused_loss(hidden, weight, **options)
    grads = torch.autograd.grad(blocked.loss, (hidden, weight))

    torch.testing.assert_close(blocked.loss, whole.loss)
    assert torch.equal(blocked.correct, whole.correct)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", list(Loss))
def test_bfloat16_is_accumulated_in_float32(kind):
    hidden, weight, teacher, rows = make_case(3, num_draft=20, dtype=torch.bfloat16, tokens=400)
    found = fused_loss(hidden, weight, teacher=teacher, rows=rows, settings=settings(kind))
    grads = torch.autograd.grad(found.loss, (hidden, weight))

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = Teacher(teacher.last.double(), teacher.head.double(), teacher.target_ids)
    total, *_ = plain(*wide, exact, rows, kind)
    expected = torch.autograd.grad(total, wide)
    assert found.loss.dtype is torch.float32
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-2)
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype is torch.bfloat16
        error = (ours.double() - theirs).norm() / theirs.norm()
        # A rounded probability can cross the target's, where the gradient of acceptance jumps.
        assert error < (0.02 if kind is Loss.kl else 0.08)


@pytest.mark.parametrize("kind", list(Loss))
def test_confident_and_wrong_drafts_stay_finite(kind):
    hidden, weight, teacher, rows = make_case(4, num_draft=None, dtype=torch.float32, scale=200.0)

    found = fused_loss(hidden, weight, teacher=teacher, rows=rows, settings=settings(kind))
    grads = torch.autograd.grad(found.loss, (hidden, weight))

    assert found.loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_a_second_backward_says_what_to_do():
    hidden, weight, teacher, rows = make_case(5, num_draft=None, dtype=torch.float64)
    loss = fused_loss(hidden, weight, teacher=teacher, rows=rows, settings=settings(Loss.kl)).loss
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="call forward again"):
        loss.backward()
