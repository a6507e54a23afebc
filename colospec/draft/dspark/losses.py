"""Cross entropy with the text, and distance to the target's distribution, chunk by chunk.

The draft's logits are the target's head applied to its states plus a low-rank correction; the
target's are the same head applied to its own last states. Weights are known beforehand, so forward
computes the gradients while the logits of a chunk exist, and backward only scales them.

Shape letters: P supervised slots, Q positions that they stand at, N and M those of a chunk, H
hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.alignment import to_device
from colospec.draft.chunks import WIDE_ELEMENTS, chunks
from colospec.draft.kernels import choice


class SlotLosses(NamedTuple):
    """total: the weighted sum, with gradients. Of each slot [P], detached: cross_entropy;
    distance, the sum of |q - p|; right, whether the draft's best token is the label; agrees,
    whether it is the target's best."""

    total: Tensor
    cross_entropy: Tensor
    distance: Tensor
    right: Tensor
    agrees: Tensor


class Teacher(NamedTuple):
    """logits [M, V] of the target; rows [N] int64: which of them each slot is compared with."""

    logits: Tensor
    rows: Tensor


class Found(NamedTuple):
    """What a comparison writes of each slot [N], as in `SlotLosses`."""

    cross_entropy: Tensor
    distance: Tensor
    right: Tensor
    agrees: Tensor


class Rows(NamedTuple):
    """hidden [P, H], normed; latent [P, R]; teacher [Q, H], the target's last states; asked [P]
    int64, on the CPU and ascending: the row of `teacher` that each slot is compared with; labels
    [P] int64; weights [P]."""

    hidden: Tensor
    latent: Tensor
    teacher: Tensor
    asked: Tensor
    labels: Tensor
    weights: Tensor


def slot_losses(
    rows: Rows,
    head: Tensor,
    correction: Tensor,
    *,
    ce_weight: float,
    l1_weight: float,
    chunk_tokens: int | None,
) -> SlotLosses:
    """Return the losses of all slots under the frozen `head` [V, H] and `correction` [V, R], whose
    products are both of the head's type.

    Losses are float32 (float64 for float64 states). At most `chunk_tokens` slots at a time have
    logits; None is CHUNK_TOKENS of the device.
    """
    settings = ce_weight, l1_weight, chunk_tokens, torch.is_grad_enabled()
    return SlotLosses(*_SlotLosses.apply(*rows, head, correction, settings))  # type: ignore[no-untyped-call]


class _SlotLosses(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor,
        teacher: Tensor,
        asked: Tensor,
        labels: Tensor,
        weights: Tensor,
        head: Tensor,
        correction: Tensor,
        settings: tuple[float, float, int | None, bool],
    ) -> tuple[Tensor, ...]:
        ce_weight, l1_weight, chunk_tokens, gradients = settings
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses, distances = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        right, agrees = (torch.empty_like(labels, dtype=torch.bool) for _ in range(2))
        grad_hidden, grad_latent = torch.empty_like(hidden), torch.empty_like(latent)
        grad_correction = torch.zeros_like(correction, dtype=dtype)
        rows = to_device(asked, hidden.device)
        # One product for both parts: logits are rounded once.
        wide = torch.cat([head, correction.to(head.dtype)], dim=1)
        width = head.shape[1]
        for part in chunks(
            len(hidden), width=len(head), chunk_tokens=chunk_tokens, device=hidden.device,
            max_elements=WIDE_ELEMENTS,
        ):  # fmt: skip
            weight, narrow = weights[part, None], latent[part].to(head.dtype)
            logits = torch.cat([hidden[part].to(head.dtype), narrow], dim=1) @ wide.T
            first, last = asked[part][[0, -1]].tolist()
            wanted = teacher[first : last + 1].to(head.dtype) @ head.T
            found = Found(losses[part], distances[part], right[part], agrees[part])
            slope = compare(
                logits, Teacher(wanted, rows[part] - first), labels[part], found,
                (ce_weight, l1_weight), gradients=gradients,
            )  # fmt: skip
            del logits, wanted
            if gradients:
                # Weights only scale the rows, and the narrow side of a product is the cheap one.
                grad = (slope @ wide) * weight
                grad_hidden[part], grad_latent[part] = grad[:, :width], grad[:, width:]
                grad_correction += slope.T @ (narrow * weight).to(head.dtype)
            # Or two chunks would live while the next one is computed.
            del slope
        total = weights.to(dtype) @ (ce_weight * losses + l1_weight * distances)
        ctx.mark_non_differentiable(losses, distances, right, agrees)
        if gradients:
            ctx.save_for_backward(grad_hidden, grad_latent, grad_correction.to(correction.dtype))
        return total, losses, distances, right, agrees

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, latent, correction = ((part * grad).to(part.dtype) for part in ctx.saved_tensors)
        return hidden, latent, None, None, None, None, None, correction, None


def compare(
    logits: Tensor,
    teacher: Teacher,
    labels: Tensor,
    found: Found,
    loss_weights: tuple[float, float],
    *,
    gradients: bool,
) -> Tensor:
    """Compare logits [N, V] with labels [N] and with the target's logits of `teacher`.

    Fills `found`; returns the gradient of loss_weights @ (cross entropy, distance) in the logits
    [N, V], of their type, if `gradients` are wanted. The logits are given up.
    """
    if choice.fused(logits):
        from colospec.draft.kernels.distance import distance_

        distance_(logits, teacher, labels, found, loss_weights, gradients=gradients)
        return logits
    dtype, label = found.distance.dtype, labels.unsqueeze(1)
    ce_weight, l1_weight = loss_weights
    wide, target = logits.to(dtype), teacher.logits.to(dtype)
    best = wide.argmax(-1)
    found.right.copy_(best == labels)
    found.agrees.copy_(best == target.argmax(-1)[teacher.rows])
    norm = wide.logsumexp(-1, keepdim=True)
    found.cross_entropy.copy_((norm - wide.gather(1, label)).squeeze(1))
    odds = wide.sub_(norm).exp_()
    gap = torch.softmax(target, dim=-1)[teacher.rows].neg_().add_(odds)
    found.distance.copy_(gap.abs().sum(-1))
    if not gradients:
        return logits
    side = gap.sign_()
    mean = torch.linalg.vecdot(odds, side).unsqueeze(1)
    slope = side.sub_(mean).mul_(l1_weight).add_(ce_weight).mul_(odds)
    return slope.scatter_add_(1, label, torch.full_like(mean, -ce_weight)).to(logits.dtype)
