"""Where blocks begin and what they see: the index maps of a block drafter for one micro-batch.

A block of b tokens begins at an anchor: a supervised token whose successor is supervised too, and
which has a token before it. So are the places where a block begins in serving: behind the token
that the target has just added. The block reads the target's features of its document strictly
before the anchor, the anchor's token, and b - 1 mask tokens; slot k predicts token anchor + k.

Only anchors that exist have a block, and only features that some block reads are in the context, so
nothing is computed for rows without any. All of it is worked out on the CPU and copied once.

Shape letters: T tokens, N blocks, b tokens of a block, C context rows, P supervised slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colospec.batch import TokenBatch
from colospec.draft.alignment import to_device


@dataclass(frozen=True)
class Span:
    """One document's part: blocks `first` to `last` of N, context rows from `start` of C on."""

    first: int
    last: int
    start: int


@dataclass(frozen=True)
class Blocks:
    """The index maps; int64.

    context_rows [C]: packed positions, ascending; context_positions [C]: their place in the
    document. input_ids, position_ids [N * b]: what the slots read, block after block. offsets [N]:
    the anchor's place in its document, which is also how many context rows its block may see;
    starts [N]: the first of these rows. slots [P]: supervised slots, as indices into N * b; labels
    [P]: their tokens; places [P]: k - 1 of each, 0 to b - 2.

    On the CPU: `spans`, one for each document that has blocks; `lengths`, the offsets; `counts`,
    supervised slots by place.
    """

    size: int
    context_rows: Tensor
    context_positions: Tensor
    input_ids: Tensor
    position_ids: Tensor
    offsets: Tensor
    starts: Tensor
    slots: Tensor
    labels: Tensor
    places: Tensor
    spans: tuple[Span, ...]
    lengths: tuple[int, ...]
    counts: tuple[int, ...]

    def to(self, device: torch.device) -> Blocks:
        """Copy the tensors to `device`, without waiting for it."""
        return Blocks(
            self.size,
            to_device(self.context_rows, device),
            to_device(self.context_positions, device),
            to_device(self.input_ids, device),
            to_device(self.position_ids, device),
            to_device(self.offsets, device),
            to_device(self.starts, device),
            to_device(self.slots, device),
            to_device(self.labels, device),
            to_device(self.places, device),
            self.spans,
            self.lengths,
            self.counts,
        )


def sample_anchors(
    tokens: TokenBatch, *, num_anchors: int, generator: torch.Generator | None
) -> Tensor:
    """Choose up to `num_anchors` anchors in each document, without bias; [N], ascending.

    The tensors of `tokens` and the generator (None: torch's global one) are on the CPU. One number
    is drawn for each token that could be an anchor.
    """
    borders = tokens.cu_seqlens.to(torch.int64)
    lengths = borders.diff()
    start = borders[:-1].repeat_interleave(lengths)
    last = borders[1:].repeat_interleave(lengths) - 1
    rows = torch.arange(tokens.num_tokens)
    mask = tokens.loss_mask
    candidates = (mask & mask.roll(-1) & (rows > start) & (rows < last)).nonzero().squeeze(1)
    document = torch.arange(len(lengths)).repeat_interleave(lengths)[candidates]
    keys = torch.rand(len(candidates), dtype=torch.float64, generator=generator)
    order = (document + keys).argsort()
    counts = torch.bincount(document, minlength=len(lengths))
    first = (counts.cumsum(0) - counts)[document]
    kept = torch.arange(len(candidates)) - first < num_anchors
    return candidates[order[kept]].sort().values


def build_blocks(
    tokens: TokenBatch, anchors: Tensor, *, block_size: int, mask_token_id: int
) -> Blocks:
    """Build the index maps for `anchors` [N]; all tensors are on the CPU."""
    borders = tokens.cu_seqlens.to(torch.int64)
    document = torch.searchsorted(borders, anchors, right=True) - 1
    start, end = borders[document], borders[document + 1]
    offsets = anchors - start
    spans, rows, used = [], [torch.empty(0, dtype=torch.int64)], 0
    numbers, sizes = torch.unique_consecutive(document, return_counts=True)
    first = 0
    for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
        begin, length = int(borders[number]), int(offsets[first + size - 1])
        spans.append(Span(first, first + size, used))
        rows.append(torch.arange(begin, begin + length))
        first, used = first + size, used + length
    context_rows = torch.cat(rows)
    begins = torch.tensor([span.start for span in spans], dtype=torch.int64)
    steps = torch.arange(block_size)
    places = anchors[:, None] + steps
    inside = places < end[:, None]
    label = places.clamp(max=max(tokens.num_tokens - 1, 0))
    supervised = inside & tokens.loss_mask[label] & (steps > 0)
    block, slot = supervised.nonzero(as_tuple=True)
    input_ids = torch.full((len(anchors), block_size), mask_token_id)
    input_ids[:, 0] = tokens.token_ids[anchors]
    return Blocks(
        size=block_size,
        context_rows=context_rows,
        context_positions=tokens.position_ids[context_rows],
        input_ids=input_ids.flatten(),
        position_ids=(tokens.position_ids[anchors][:, None] + steps).flatten(),
        offsets=offsets,
        starts=begins.repeat_interleave(sizes),
        slots=block * block_size + slot,
        labels=tokens.token_ids[label[block, slot]],
        places=slot - 1,
        spans=tuple(spans),
        lengths=tuple(offsets.tolist()),
        counts=tuple(torch.bincount(slot - 1, minlength=block_size - 1).tolist()),
    )
