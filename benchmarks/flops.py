"""How much arithmetic the work needs, in floating-point operations: [m, k] times [k, n] is 2 m k n.

Useful work alone: nothing that is recomputed, no position that is not supervised, half of causal
attention. `lengths` are the documents' tokens, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colospec.draft.anchors import Blocks
from colospec.target import Target

PEAK = {"NVIDIA H200": 989.4e12, "NVIDIA H100 80GB HBM3": 989.4e12}
"""Dense bfloat16 operations per second, by the data sheet."""


@dataclass(frozen=True)
class Supervised:
    """What the vocabulary heads are applied to: `teacher_rows` once by the target's, `positions` of
    all TTT steps by the draft's."""

    teacher_rows: int
    positions: int

    @classmethod
    def of(cls, lengths: Sequence[int], *, ttt_length: int) -> Supervised:
        """Count for documents in which every token is supervised."""
        rows = sum(max(length - 2, 0) for length in lengths)
        steps = range(ttt_length)
        return cls(rows, sum(max(n - 2 - step, 0) for n in lengths for step in steps))


@dataclass(frozen=True)
class Drafted:
    """What a block drafter computes for: `context_rows` that some block sees, all `slots` of all
    blocks, `pairs` of a slot and what it attends to, and the supervised slots, the `positions`."""

    context_rows: int
    slots: int
    pairs: int
    positions: int

    @classmethod
    def of(cls, blocks: Blocks) -> Drafted:
        """Count one micro-batch."""
        slots = len(blocks.input_ids)
        pairs = blocks.size * sum(blocks.lengths) + slots * blocks.size
        return cls(len(blocks.context_rows), slots, pairs, len(blocks.slots))


def layer_parameters(target: Target) -> int:
    """Return the matrix elements of one decoder layer."""
    heads = 2 * (target.num_attention_heads + target.num_key_value_heads)
    return target.hidden_size * (heads * target.head_dim + 3 * target.intermediate_size)


def draft_layer_parameters(target: Target) -> int:
    """Return those of the EAGLE-3 layer, whose attention reads two hidden states side by side."""
    heads = target.num_attention_heads + 2 * target.num_key_value_heads
    return layer_parameters(target) + target.hidden_size * heads * target.head_dim


def attention(target: Target, lengths: Sequence[int]) -> float:
    """Return the two products of causal attention, forward, in one layer."""
    width = target.num_attention_heads * target.head_dim
    return 2.0 * width * sum(length**2 for length in lengths)


def prefill(target: Target, lengths: Sequence[int]) -> float:
    """Return the target's forward pass without its head."""
    per_layer = 2.0 * layer_parameters(target) * sum(lengths) + attention(target, lengths)
    return target.num_layers * per_layer


def eagle3(
    target: Target,
    lengths: Sequence[int],
    *,
    supervised: Supervised,
    ttt_length: int,
    draft_vocab_size: int | None,
    num_aux: int = 3,
    frozen_head: bool = False,
) -> float:
    """Return a training step, forward and backward, with the target's head as the teacher.

    Backward costs twice forward; 2.5 times in flash attention, which recomputes the scores; once
    for the first projection, whose input needs no gradient, and for a frozen head.
    """
    num_tokens, width = sum(lengths), target.hidden_size
    layer = 6.0 * draft_layer_parameters(target) * num_tokens + 3.5 * attention(target, lengths)
    projection = 4.0 * num_aux * width**2 * num_tokens
    head = (4.0 if frozen_head else 6.0) * width * (draft_vocab_size or target.vocab_size)
    teacher = 2.0 * width * target.vocab_size * supervised.teacher_rows
    return ttt_length * layer + projection + head * supervised.positions + teacher


def dflash(target: Target, drafted: Drafted, *, num_layers: int, num_aux: int) -> float:
    """Return a training step, forward and backward: nothing for anchors that do not exist, and the
    head for supervised slots alone.

    The frozen head costs twice its forward pass, the projection of the target's states likewise.
    """
    width, kv_width = target.hidden_size, target.num_key_value_heads * target.head_dim
    slots = 6.0 * layer_parameters(target) * drafted.slots
    context = 6.0 * 2 * width * kv_width * drafted.context_rows
    attended = 3.5 * 4.0 * target.num_attention_heads * target.head_dim * drafted.pairs
    projection = 4.0 * num_aux * width**2 * drafted.context_rows
    head = 4.0 * width * target.vocab_size * drafted.positions
    return num_layers * (slots + context + attended) + projection + head
