"""How much arithmetic the work needs, in floating-point operations: [m, k] times [k, n] is 2 m k n.

Useful work alone: nothing that is recomputed, no position that is not supervised, half of causal
attention. `lengths` are the documents' tokens, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colospec.batch import TokenBatch
from colospec.config import DraftConfig
from colospec.draft import registry
from colospec.draft.anchors import Blocks, build_blocks, sample_anchors
from colospec.draft.dflash.labels import shift_labels
from colospec.draft.peagle.sampling import Places, sample_places
from colospec.target import Target

PEAK = {"NVIDIA H200": 989.4e12, "NVIDIA H100 80GB HBM3": 989.4e12}
"""Dense bfloat16 operations per second, by the data sheet."""
ATTENTION = 3.5
"""What a step of flash attention costs against its forward pass; backward computes the scores once
more."""


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
    """Return a training step, forward and backward, with the target's head as the teacher: the sum
    of `eagle3_parts`."""
    parts = eagle3_parts(
        target, lengths, supervised=supervised, ttt_length=ttt_length,
        draft_vocab_size=draft_vocab_size, num_aux=num_aux, frozen_head=frozen_head,
    )  # fmt: skip
    return sum(parts.values())


def eagle3_parts(
    target: Target,
    lengths: Sequence[int],
    *,
    supervised: Supervised,
    ttt_length: int,
    draft_vocab_size: int | None,
    num_aux: int = 3,
    frozen_head: bool = False,
) -> dict[str, float]:
    """Return what `loss` (both heads), `attention`, `layer` (the rest of it) and `projection` (of
    the aux states) need in a training step.

    Backward costs twice forward; 2.5 times in flash attention, which recomputes the scores; once
    for the first projection, whose input needs no gradient, and for a frozen head.
    """
    num_tokens, width = sum(lengths), target.hidden_size
    head = (4.0 if frozen_head else 6.0) * width * (draft_vocab_size or target.vocab_size)
    teacher = 2.0 * width * target.vocab_size * supervised.teacher_rows
    return {
        "loss": head * supervised.positions + teacher,
        "attention": ATTENTION * attention(target, lengths) * ttt_length,
        "layer": 6.0 * draft_layer_parameters(target) * num_tokens * ttt_length,
        "projection": 4.0 * num_aux * width**2 * num_tokens,
    }


def dflash(target: Target, drafted: Drafted, *, num_layers: int, num_aux: int) -> float:
    """Return a training step, forward and backward: nothing for anchors that do not exist, and the
    head for supervised slots alone.

    The frozen head costs twice its forward pass, the projection of the target's states likewise.
    """
    width, kv_width = target.hidden_size, target.num_key_value_heads * target.head_dim
    slots = 6.0 * layer_parameters(target) * drafted.slots
    context = 6.0 * 2 * width * kv_width * drafted.context_rows
    attended = ATTENTION * 4.0 * target.num_attention_heads * target.head_dim * drafted.pairs
    projection = 4.0 * num_aux * width**2 * drafted.context_rows
    head = 4.0 * width * target.vocab_size * drafted.positions
    return num_layers * (slots + context + attended) + projection + head


def domino(
    target: Target, drafted: Drafted, *, num_layers: int, num_aux: int, gru: int, rank: int,
    corrected: int,
) -> float:  # fmt: skip
    """Return a training step of DFlash with a GRU of width `gru` over all slots, whose tokens need
    no gradient, and a correction of `corrected` slots' logits by products of `rank`."""
    read = 3 * gru * (4.0 * target.hidden_size + 6.0 * gru) * drafted.slots
    narrow = 6.0 * rank * (target.hidden_size + gru) * corrected
    wide = 6.0 * rank * target.vocab_size * corrected
    return dflash(target, drafted, num_layers=num_layers, num_aux=num_aux) + read + narrow + wide


def dspark(
    target: Target, drafted: Drafted, *, num_layers: int, num_aux: int, rank: int, markov: int,
    teacher_rows: int,
) -> float:  # fmt: skip
    """Return a training step of DFlash whose logits are corrected by products of `rank`, from
    `markov` matrix elements for each slot, and compared with the target's of `teacher_rows`."""
    correction = 6.0 * (rank * target.vocab_size * drafted.positions + markov * drafted.slots)
    teacher = 2.0 * target.hidden_size * target.vocab_size * teacher_rows
    return dflash(target, drafted, num_layers=num_layers, num_aux=num_aux) + correction + teacher


def peagle(
    target: Target, places: Places, *, num_layers: int, num_aux: int, draft_vocab_size: int | None
) -> float:
    """Return a training step: EAGLE-3's layer and plain ones for the places of all depths, a chain
    of masks after the places up to its anchor; the draft's head, and the target's once per row."""
    first = len(places.rows)
    chains = [chain.blocks for chain in places.chains]
    number = first + sum(len(blocks.input_ids) for blocks in chains)
    pairs = sum(
        blocks.size * (sum(blocks.lengths) + len(blocks.lengths) * (blocks.size + 1) / 2)
        for blocks in chains
    )
    attended = attention(target, places.borders.diff().tolist())
    attended += 4.0 * target.num_attention_heads * target.head_dim * pairs
    parameters = draft_layer_parameters(target) + (num_layers - 1) * layer_parameters(target)
    width, learning = target.hidden_size, places.learning
    return (
        6.0 * parameters * number
        + ATTENTION * attended * num_layers
        + 4.0 * num_aux * width**2 * first
        + 6.0 * width * (draft_vocab_size or target.vocab_size) * len(learning.positions)
        + 2.0 * width * target.vocab_size * len(learning.teacher_rows)
    )


@dataclass(frozen=True)
class Work:
    """What a training step has to do: its operations, and what they are done for."""

    flop: float
    counts: dict[str, int]


def step(config: DraftConfig, target: Target, tokens: TokenBatch) -> Work | None:
    """Return the work of a training step on `tokens`, for one draw where the algorithm draws; None
    for an algorithm of another package."""
    formula = FORMULAS.get(config.algorithm)
    return None if formula is None else formula(config, target, tokens)


def _eagle3_step(config: Any, target: Target, tokens: TokenBatch) -> Work:
    if not bool(tokens.loss_mask.all()):
        raise ValueError("operations of Eagle3 are counted for samples that learn everywhere")
    lengths = tokens.cu_seqlens.diff().tolist()
    supervised = Supervised.of(lengths, ttt_length=config.ttt_length)
    flop = eagle3(
        target, lengths, supervised=supervised, ttt_length=config.ttt_length,
        draft_vocab_size=config.draft_vocab_size,
        num_aux=len(registry.features(config, target).aux_layer_ids),
    )  # fmt: skip
    counts = {
        "teacher_rows": supervised.teacher_rows, "supervised_positions": supervised.positions,
    }  # fmt: skip
    return Work(flop, counts)


def _anchors(config: Any, tokens: TokenBatch) -> tuple[Tensor, Blocks]:
    generator = torch.Generator().manual_seed(0)
    anchors = sample_anchors(tokens, num_anchors=config.num_anchors, generator=generator)
    return anchors, build_blocks(tokens, anchors, block_size=config.block_size, mask_token_id=0)


def _layers(config: Any, target: Target) -> dict[str, int]:
    num_aux = len(registry.features(config, target).aux_layer_ids)
    return {"num_layers": config.num_layers, "num_aux": num_aux}


def _block_work(flop: float, blocks: Blocks) -> Work:
    counts = {"blocks": len(blocks.lengths), "supervised_positions": len(blocks.slots)}
    return Work(flop, counts)


def _dflash_step(config: Any, target: Target, tokens: TokenBatch) -> Work:
    _, blocks = _anchors(config, tokens)
    return _block_work(dflash(target, Drafted.of(blocks), **_layers(config, target)), blocks)


def _domino_step(config: Any, target: Target, tokens: TokenBatch) -> Work:
    anchors, blocks = _anchors(config, tokens)
    if config.shift_label:
        blocks, _ = shift_labels(tokens, anchors, blocks, unbroken=False)
    flop = domino(
        target, Drafted.of(blocks), **_layers(config, target), gru=config.gru_hidden_dim,
        rank=config.emb_dim, corrected=sum(blocks.counts[config.pure_draft_prefix_len :]),
    )  # fmt: skip
    return _block_work(flop, blocks)


def _dspark_step(config: Any, target: Target, tokens: TokenBatch) -> Work:
    blocks, rows = shift_labels(tokens, *_anchors(config, tokens), unbroken=True)
    rank, width = config.markov_rank, target.hidden_size
    markov = {"vanilla": 0, "gated": rank * (width + rank), "rnn": 3 * rank * (2 * rank + width)}
    flop = dspark(
        target, Drafted.of(blocks), **_layers(config, target), rank=rank,
        markov=markov[config.markov_head_type.value], teacher_rows=len(set(rows.tolist())),
    )  # fmt: skip
    return _block_work(flop, blocks)


def _peagle_step(config: Any, target: Target, tokens: TokenBatch) -> Work:
    places = sample_places(tokens, config, generator=torch.Generator().manual_seed(0))
    flop = peagle(
        target, places, **_layers(config, target), draft_vocab_size=config.draft_vocab_size
    )
    return Work(flop, {"supervised_positions": len(places.learning.positions)})


FORMULAS: dict[str, Callable[[Any, Target, TokenBatch], Work]] = {
    "eagle3": _eagle3_step,
    "dflash": _dflash_step,
    "domino": _domino_step,
    "dspark": _dspark_step,
    "peagle": _peagle_step,
}
