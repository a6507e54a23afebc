"""Cross entropy under the target's frozen head, chunk by chunk, gradient included.

The head is not trained, so the gradient of one row's loss in its state is all that backward needs:
(softmax - label) times the head. The forward pass computes it while the row's logits exist, and
weights that are chosen afterwards, even from the losses themselves, only scale it.

Shape letters: P rows, H hidden size, V target vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.loss import CHUNK_TOKENS, MAX_ELEMENTS


def head_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, *, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row [P], float32 (float64 for float64 states), and whether its most
    likely token is the label [P] bool.

    hidden [P, H]: normed states; head [V, H]; labels [P] int64. At most `chunk_tokens` rows at a
    time have logits; None is CHUNK_TOKENS of the device.
    """
    loss, right = _CrossEntropy.apply(hidden, head, labels, chunk_tokens, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss, right


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        chunk_tokens: int | None,
        gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_empty(len(hidden), dtype=dtype)
        right = torch.empty_like(labels, dtype=torch.bool)
        grad = torch.empty_like(hidden) if gradients else None
        kind = hidden.device.type
        wanted = chunk_tokens or CHUNK_TOKENS[kind]
        rows = max(1, min(wanted, MAX_ELEMENTS[kind] // len(head)))
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            label = labels[part, None]
            logits = (hidden[part].to(head.dtype) @ head.T).to(dtype)
            right[part] = logits.argmax(-1) == labels[part]
            norm = logits.logsumexp(-1, keepdim=True)
            chosen = logits.gather(1, label)
            loss[part] = (norm - chosen).squeeze(1)
            if grad is not None:
                probs = logits.sub_(norm).exp_()
                probs.scatter_add_(1, label, torch.full_like(chosen, -1.0))
                grad[part] = (probs.to(head.dtype) @ head).to(grad.dtype)
        ctx.mark_non_differentiable(right)
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        return (states * grad.unsqueeze(1)).to(states.dtype), None, None, None, None
