"""Cross entropy under the target's frozen head, chunk by chunk, gradient included.

The head is not trained, so the gradient of one row's loss in its state is all that backward needs:
(softmax - label) times the head. The forward pass computes it while the row's logits exist, and
weights that are chosen afterwards, even from the losses themselves, only scale it.

Shape letters: P rows, H hidden size, V target vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from colospec.draft.chunks import chunks
from colospec.draft.kernels import choice

# As WIDE_ELEMENTS, but only one such tensor lives at a time on a GPU.
MAX_ELEMENTS = {"cpu": 2**23, "cuda": 5 * 2**28}


def head_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, *, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row [P], float32 (float64 for float64 states), and whether its most
    likely token, the first of equally likely ones, is the label [P] bool.

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
        for part in chunks(
            len(hidden),
            width=len(head),
            chunk_tokens=chunk_tokens,
            device=hidden.device,
            max_elements=MAX_ELEMENTS,
        ):
            logits = hidden[part].to(head.dtype) @ head.T
            slope = compare(logits, labels[part], loss[part], right[part], gradients=gradients)
            del logits
            if grad is not None:
                grad[part] = slope @ head
            # Or two chunks would live while the next one is computed.
            del slope
        ctx.mark_non_differentiable(right)
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        scaled = torch.mul(states, grad.unsqueeze(1), out=torch.empty_like(states))
        return scaled, None, None, None, None


def compare(
    logits: Tensor, labels: Tensor, loss: Tensor, right: Tensor, *, gradients: bool
) -> Tensor:
    """Compare logits [R, V] with labels [R]: write the cross entropy `loss` [R], of the type that
    sums have, and `right` [R] bool, whether the best token is the label.

    Returns the gradient of each loss in its logits [R, V], of their type, if `gradients` are
    wanted. The logits are given up.
    """
    if choice.fused(logits):
        from colospec.draft.kernels.cross_entropy import cross_entropy_

        cross_entropy_(logits, labels, loss, right, gradients=gradients)
        return logits
    wide = logits.to(loss.dtype)
    right.copy_(wide.argmax(-1) == labels)
    norm = wide.logsumexp(-1, keepdim=True)
    label = labels.unsqueeze(1)
    chosen = wide.gather(1, label)
    loss.copy_((norm - chosen).squeeze(1))
    if not gradients:
        return logits
    probs = wide.sub_(norm).exp_()
    probs.scatter_add_(1, label, torch.full_like(chosen, -1.0))
    return probs.to(logits.dtype)
