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

from colospec.draft.chunks import WIDE_ELEMENTS, chunks
from colospec.draft.cross_entropy import compare


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
    correction [V, E] are added, all in the head's type. labels [P] int64; weights [P]. At most
    `chunk_tokens` slots at a time have logits; None is CHUNK_TOKENS of the device.
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
        base_loss, loss = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        base_right, right = (torch.empty_like(labels, dtype=torch.bool) for _ in range(2))
        grad_hidden, grad_latent = torch.empty_like(hidden), torch.empty_like(latent)
        grad_correction = torch.zeros_like(correction, dtype=dtype)
        added = correction.to(head.dtype)
        for part in chunks(
            len(hidden), width=len(head), chunk_tokens=chunk_tokens, device=hidden.device,
            max_elements=WIDE_ELEMENTS,
        ):  # fmt: skip
            narrow, weight = latent[part].to(head.dtype), weights[part, None]
            base = hidden[part].to(head.dtype) @ head.T
            slope = compare(
                torch.addmm(base, narrow, added.T), labels[part], loss[part], right[part],
                gradients=gradients,
            )  # fmt: skip
            base_slope = compare(
                base, labels[part], base_loss[part], base_right[part],
                gradients=gradients and share > 0,
            )  # fmt: skip
            del base
            if gradients:
                # Weights only scale the rows, and the narrow side of a product is the cheap one.
                corrected = (1 - share) * weight
                grad_latent[part] = (slope @ added) * corrected
                grad_correction += slope.T @ (narrow * corrected).to(head.dtype)
                if share > 0:
                    slope.lerp_(base_slope, share)
                grad_hidden[part] = (slope @ head) * weight
            # Or two chunks would live while the next one is computed.
            del slope, base_slope
        ctx.mark_non_differentiable(base_right, right)
        if gradients:
            ctx.save_for_backward(grad_hidden, grad_latent, grad_correction.to(correction.dtype))
        total = weights.to(dtype) @ (share * base_loss + (1 - share) * loss)
        return total, base_right, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, latent, correction = ((part * grad).to(part.dtype) for part in ctx.saved_tensors)
        return hidden, latent, None, correction, None, None, None
