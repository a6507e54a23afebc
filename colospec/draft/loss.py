"""Vocabulary head and loss of all TTT steps, chunk by chunk, gradients included.

The logits of all positions would be the largest tensors of the training by far, so none of them
outlives its chunk. A chunk is a run of teacher rows: the target's head is applied to it once, then
every TTT step that has a position with one of these teachers is compared with the result.

The forward pass computes the gradients too, and backward only scales them. That costs 6 D W
operations for each supervised position of each step and 2 H (V + W) for each teacher row (2 H V
without a pruned vocabulary). Recomputing in backward would add 2 D W and the whole target side
again, to save the two buffers that we keep: [P, D] and the gradient of the head [W, D], which
autograd would have to allocate anyhow.

With teacher p and draft q over the draft's vocabulary, the loss of one position is

    kl         -sum p log q: forward KL up to the teacher's entropy, which has no gradient
    lk_alpha   -log a, with the acceptance rate a = sum min(p', q)       (arXiv 2602.23881)
    lk_lambda  l kl + (1 - l) (1 - a), with l = exp(-lk_eta a) taken as a constant

where p is normalised over the draft's vocabulary, and p' over the target's. Positions whose most
likely token the draft cannot say have no loss.

Shape letters: T tokens, Q teacher rows, P supervised positions of all K steps, C rows of a chunk,
H target hidden size, D draft hidden size, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.alignment import Unroll
from colospec.draft.chunks import MAX_ELEMENTS, chunks
from colospec.draft.kernels import choice
from colospec.draft.settings import Loss

MIN_ACCEPTANCE = 1e-8


@dataclass(frozen=True)
class LossSettings:
    """Which loss, and the weight of each TTT step. `chunk_tokens` bounds the rows of a chunk;
    None is CHUNK_TOKENS of the device."""

    kind: Loss
    lk_eta: float
    step_weights: tuple[float, ...]
    chunk_tokens: int | None


@dataclass(frozen=True)
class Teacher:
    """The target's distributions, not yet computed.

    last [T, H] post-norm hidden states; head [V, H]; target_ids [W] int64: the target token of each
    draft token, ascending, or None where the draft has the whole vocabulary.
    """

    last: Tensor
    head: Tensor
    target_ids: Tensor | None


class LossSums(NamedTuple):
    """Sums over supervised positions, float32 (float64 for float64 inputs).

    loss: scalar, the only one with a gradient, over all steps, weighted; correct [K]: positions
    where the draft's most likely token is the target's; acceptance [K]: sum of min(p', q).
    """

    loss: Tensor
    correct: Tensor
    acceptance: Tensor


def fused_loss(
    hidden: Tensor, weight: Tensor, *, teacher: Teacher, rows: Unroll, settings: LossSettings
) -> LossSums:
    """Compare the draft with the target at all supervised positions.

    hidden [P, D]: normed draft states in the order of `rows.positions`; weight [W, D]: the draft's
    head. Backward may run once.
    """
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LossSums(*_FusedLoss.apply(hidden, weight, teacher, rows, settings, gradients))  # type: ignore[no-untyped-call]


class _FusedLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: Teacher,
        rows: Unroll,
        settings: LossSettings,
        gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        terms = hidden.new_empty(3, len(hidden), dtype=dtype)
        if gradients:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=dtype)
        for start, end in _chunks(rows, settings, weight):
            compare = _teach(teacher, rows, (start, end), settings, terms)
            for step, span in _steps(rows, start, end):
                states = hidden[slice(*span)]
                grad = compare(states @ weight.T, step, span, gradients)
                if grad is not None:
                    torch.mm(grad, weight, out=grad_hidden[slice(*span)])
                    _add_product(grad_weight, grad, states)
                # Or it would live on beside that of the next step.
                del grad
            del compare
        if gradients:
            ctx.gradients = grad_hidden, grad_weight.to(weight.dtype)
        parts = torch.split(terms, rows.sizes, dim=1)
        correct, acceptance = (torch.stack([p[i].sum() for p in parts]) for i in (1, 2))
        ctx.mark_non_differentiable(correct, acceptance)
        return terms[0].sum(), correct, acceptance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss keeps its gradients for one backward pass; call forward again"
            )
        # In place, as the gradient of the head may be gigabytes: hence only once.
        grad_hidden, grad_weight = (buffer.mul_(grad) for buffer in ctx.gradients)
        ctx.gradients = None
        return grad_hidden, grad_weight, None, None, None, None


Compare = Callable[[Tensor, int, tuple[int, int], bool], Tensor | None]
"""(draft logits [R, W] of a step, the step, its span of P, whether gradients are wanted) ->
gradient [R, W] of the weighted loss, of the type of the logits. Writes columns `span` of the terms
[3, P]: weighted loss, 1 where both sides' most likely tokens agree, acceptance rate."""


def _teach(
    teacher: Teacher, rows: Unroll, span: tuple[int, int], settings: LossSettings, terms: Tensor
) -> Compare:
    """Compute the teacher's distributions of a chunk and return what compares a step with them."""
    last = teacher.last.index_select(0, rows.teacher_rows[slice(*span)]).to(teacher.head.dtype)
    if choice.fused(last):
        return _teach_by_kernels(last, teacher, rows, span[0], settings, terms)
    target = _target(last, teacher, terms.dtype)

    def compare(
        logits: Tensor, step: int, positions: tuple[int, int], gradients: bool
    ) -> Tensor | None:
        part = slice(*positions)
        picked = target.select(rows.slots[part] - span[0])
        row_weight = settings.step_weights[step] * picked.kept
        found = _compare(logits.to(terms.dtype), picked, settings, gradients)
        terms[0, part] = found.loss * row_weight
        terms[1, part] = (found.token == picked.token).to(terms.dtype)
        terms[2, part] = found.acceptance
        if found.grad is None:
            return None
        return found.grad.mul_((found.grad_scale * row_weight).unsqueeze(-1)).to(logits.dtype)

    return compare


def _teach_by_kernels(
    last: Tensor,
    teacher: Teacher,
    rows: Unroll,
    start: int,
    settings: LossSettings,
    terms: Tensor,
) -> Compare:
    from colospec.draft.kernels import loss as kernels

    target = kernels.teacher_rows(last, teacher.head, teacher.target_ids)

    def compare(
        logits: Tensor, step: int, positions: tuple[int, int], gradients: bool
    ) -> Tensor | None:
        kernels.compare(
            logits,
            target,
            (rows.slots, positions[0], start),
            terms,
            kernels.StepSettings(
                settings.kind, settings.lk_eta, settings.step_weights[step], MIN_ACCEPTANCE
            ),
            gradients=gradients,
        )
        return logits if gradients else None

    return compare


def _chunks(rows: Unroll, settings: LossSettings, weight: Tensor) -> Iterator[tuple[int, int]]:
    """Split the teacher rows so that a [chunk, W] tensor has at most MAX_ELEMENTS elements."""
    num_rows = len(rows.teacher_rows)
    # The target's logits are computed in pieces of the vocabulary, of at least this many tokens.
    narrowest = 2**15 if weight.device.type == "cuda" else 1
    width, chunk_tokens = max(len(weight), narrowest), settings.chunk_tokens
    for part in chunks(num_rows, width=width, chunk_tokens=chunk_tokens, device=weight.device):
        yield part.start, part.stop


def _steps(rows: Unroll, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """For each step that uses teacher rows start..end: the step, and its span of P.

    Supervised positions of a step lie in the order of their teachers, so the span is contiguous.
    """
    first = 0
    bounds = rows.counts[:, [start, end, -1]].tolist()
    for step, (low, high, size) in enumerate(bounds):
        span = (first + low, first + high)
        if low < high:
            yield step, span
        first += size


@dataclass(frozen=True)
class _Target:
    """Teacher distributions of C rows.

    probs [C, W], normalised over the draft's vocabulary; mass [C]: how much of the target's
    distribution that is, None for all; token [C]: the target's most likely token, in target ids;
    kept [C]: whether the draft can say it; target_ids as in Teacher.
    """

    probs: Tensor
    mass: Tensor | None
    token: Tensor
    kept: Tensor
    target_ids: Tensor | None

    def select(self, slots: Tensor) -> _Target:
        """Take some of the rows, ascending; all of them are not copied."""
        if len(slots) == len(self.probs):
            return self
        return _Target(
            self.probs[slots],
            None if self.mass is None else self.mass[slots],
            self.token[slots],
            self.kept[slots],
            self.target_ids,
        )


def _target(last: Tensor, teacher: Teacher, dtype: torch.dtype) -> _Target:
    """Apply the target's head to `last` [C, H]."""
    head = teacher.head
    if teacher.target_ids is None:
        logits = (last @ head.T).to(dtype)
        token = logits.argmax(-1)
        return _Target(logits.softmax(-1), None, token, torch.ones_like(token, dtype=dtype), None)

    ids = teacher.target_ids
    block = max(1, MAX_ELEMENTS[head.device.type] // len(last))
    norm, token = _scan_vocabulary(last, head, block, dtype)
    logits = last.new_empty(len(last), len(ids), dtype=dtype)
    for part, out in zip(torch.split(ids, block), torch.split(logits, block, dim=1), strict=True):
        out.copy_(last @ head.index_select(0, part).T)
    mass = (logits.logsumexp(-1) - norm).exp()
    slot = torch.searchsorted(ids, token).clamp_(max=len(ids) - 1)
    return _Target(logits.softmax(-1), mass, token, (ids[slot] == token).to(dtype), ids)


def _scan_vocabulary(
    last: Tensor, head: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and argmax of the target's logits, `block` tokens at a time; [C] each."""
    best = last.new_full((len(last),), -torch.inf, dtype=dtype)
    norm, token = best.clone(), torch.zeros_like(best, dtype=torch.int64)
    for first in range(0, len(head), block):
        logits = (last @ head[first : first + block].T).to(dtype)
        top, index = logits.max(-1)
        token = torch.where(top > best, index + first, token)
        best = torch.maximum(best, top)
        norm = torch.logaddexp(norm, logits.logsumexp(-1))
    return norm, token


class _Terms(NamedTuple):
    """Per row [R]: loss, acceptance, token (in target ids); with gradients also `grad` [R, W] and
    `grad_scale` [R]: the gradient of the loss in the logits is their product."""

    loss: Tensor
    acceptance: Tensor
    token: Tensor
    grad: Tensor | None
    grad_scale: Tensor


def _compare(logits: Tensor, target: _Target, settings: LossSettings, gradients: bool) -> _Terms:
    """Compare draft and target at R positions; `logits` [R, W]."""
    top, token = logits.max(-1)
    probs = logits.softmax(-1)
    # The largest probability is exp(top - logsumexp), so the norm needs no pass of its own.
    norm = top - probs.gather(1, token.unsqueeze(1)).squeeze(1).log()
    cross_entropy = norm - torch.linalg.vecdot(target.probs, logits)
    del logits
    overlap = target.probs.clone() if target.mass is None else target.probs * target.mass[:, None]
    torch.minimum(overlap, probs, out=overlap)
    acceptance = overlap.sum(-1)
    if target.target_ids is not None:
        token = target.target_ids[token]
    ones = torch.ones_like(acceptance)
    if settings.kind is Loss.kl:
        grad = probs.sub_(target.probs) if gradients else None
        return _Terms(cross_entropy, acceptance, token, grad, ones)

    bounded = acceptance.clamp(min=MIN_ACCEPTANCE)
    share = torch.exp(-settings.lk_eta * acceptance).unsqueeze(1)
    alpha = settings.kind is Loss.lk_alpha
    loss = -bounded.log() if alpha else torch.lerp(1 - acceptance, cross_entropy, share.squeeze(1))
    if not gradients:
        return _Terms(loss, acceptance, token, None, ones)
    # The acceptance grows only with the probabilities that are below the target's.
    below = overlap.mul_(overlap == probs)
    grad = (probs * below.sum(-1, keepdim=True)).sub_(below)
    if alpha:
        scale = torch.where(acceptance > MIN_ACCEPTANCE, 1 / bounded, 0.0)
        return _Terms(loss, acceptance, token, grad, scale)
    return _Terms(loss, acceptance, token, grad.lerp_(probs.sub_(target.probs), share), ones)


def _add_product(total: Tensor, grad: Tensor, states: Tensor) -> None:
    """Add grad^T states to `total` [W, D], whose type may be wider than that of `grad` [R, W]."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, states)
    elif total.device.type == "cuda":
        torch.addmm(total, grad.T, states, out_dtype=total.dtype, out=total)
    else:
        block = max(1, MAX_ELEMENTS[total.device.type] // total.shape[1])
        for part, columns in zip(
            torch.split(total, block), torch.split(grad, block, dim=1), strict=True
        ):
            part += columns.T @ states
