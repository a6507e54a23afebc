"""Two cross entropies of each slot, without its correction and with it, chunk by chunk.

As in `draft.cross_entropy` the head is frozen; the correction's own head is trained. Forward
computes the gradients while the logits of a chunk exist, and backward only scales them.

Shape letters: P supervised slots, H hidden size, E rank, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.chunks import chunks


class PairLosses(NamedTuple):
    """total: the weighted sum, with gradients; of each slot [P], detached, whether the best token
    is the label: base_right without the correction, right with it."""

    total: Tensor
    base_right: Tensor
    right: Tensor


def pair_losses(
    hidden: Tensor,
    latent: Tensor,
    head: Tensor,
    correction: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    base_share: float,
    chunk_tokens: int | None,
) -> PairLosses:
    """Return sum(weights * (base_share * base + (1 - base_share) * corrected)), float32 (float64
    for float64 states).

    hidden [P, H], normed, and the frozen head [V, H] make the base logits; latent [P, E] and
    correction [V, E] are added. labels [P] int64; weights [P]. At most `chunk_tokens` slots at a
    time have logits; None is CHUNK_TOKENS of the device.
    """
    settings = base_share, chunk_tokens, torch.is_grad_enabled()
    found = _PairLosses.apply(hidden, latent, head, correction, labels, weights, settings)  # type: ignore[no-untyped-call]
    return PairLosses(*found)


class _PairLosses(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor,
        head: Tensor,
        correction: Tensor,
        labels: Tensor,
        weights: Tensor,
        settings: tuple[float, int | None, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        share, chunk_tokens, gradients = settings
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=dtype)
        base_right, right = (torch.empty_like(labels, dtype=torch.bool) for _ in range(2))
        grad_hidden, grad_latent = torch.empty_like(hidden), torch.empty_like(latent)
        grad_correction = torch.zeros_like(correction, dtype=dtype)
        for part in chunks(
            len(hidden), width=len(head), chunk_tokens=chunk_tokens, device=hidden.device
        ):
            base = (hidden[part].to(head.dtype) @ head.T).to(dtype)
            final = base + latent[part] @ correction.T
            loss, base_right[part] = _cross_entropy_(base, labels[part])
            total += share * (weights[part] @ loss)
            loss, right[part] = _cross_entropy_(final, labels[part])
            total += (1 - share) * (weights[part] @ loss)
            if not gradients:
                continue
            final.mul_((1 - share) * weights[part, None])
            narrow = final.to(correction.dtype)
            grad_latent[part] = narrow @ correction
            grad_correction += narrow.T @ latent[part]
            final.addcmul_(base, weights[part, None], value=share)
            grad_hidden[part] = final.to(head.dtype) @ head
        ctx.mark_non_differentiable(base_right, right)
        if gradients:
            ctx.save_for_backward(grad_hidden, grad_latent, grad_correction.to(correction.dtype))
        return total, base_right, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, latent, correction = ((part * grad).to(part.dtype) for part in ctx.saved_tensors)
        return hidden, latent, None, correction, None, None, None


def _cross_entropy_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [n] and hits [n], and turn the logits [n, V] into the gradients of the
    losses."""
    label = labels[:, None]
    right = logits.argmax(-1) == labels
    norm = logits.logsumexp(-1, keepdim=True)
    loss = norm - logits.gather(1, label)
    logits.sub_(norm).exp_().scatter_add_(1, label, torch.full_like(loss, -1.0))
    return loss.squeeze(1), right
