"""Which places learn at which depth: the index maps of P-EAGLE for one micro-batch.

Count positions from 0 in a document. At depth 0 the draft stands at position t, reads the target's
features of token t and token t + 1, and predicts token t + 2. At depth d it stands at t + d and
reads masks instead: it guesses d tokens further from the same anchor t. Depth 0 is everywhere, as
the rest attends to it. Deeper places are drawn anew at each step: an anchor goes on to depth d only
if it had d - 1 and its place there is supervised; of these a share is kept.

So each anchor has a chain of depths 1 to some length. Chains of one length are stored together, as
blocks that see the depth-0 places up to their anchor: no place is computed that does not learn.
All of it is worked out on the CPU and copied once.

Shape letters: T tokens, E places of all depths, R of depth 0, K depths, Q teacher rows, P
supervised places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colospec.batch import TokenBatch
from colospec.draft.alignment import Unroll, to_device
from colospec.draft.anchors import Blocks, build_blocks
from colospec.draft.peagle.config import PEagleConfig


@dataclass(frozen=True)
class Chains:
    """blocks: chains of one length, each a block behind its anchor; context [C] int64: the depth-0
    places, counted from 0 to R, that `blocks` calls context rows."""

    blocks: Blocks
    context: Tensor


@dataclass(frozen=True)
class Places:
    """Depth-0 places come first, then each of `chains`, block after block.

    rows [R]: packed positions of depth 0; token_ids [R]: what they read; position_ids [E]; borders:
    where documents begin among the R, on the host. learning: as for TTT, a step being a depth,
    except that its `positions` [P] are indices into the E places; its `input_ids` mean nothing.
    """

    rows: Tensor
    token_ids: Tensor
    position_ids: Tensor
    borders: Tensor
    chains: tuple[Chains, ...]
    learning: Unroll

    def to(self, device: torch.device) -> Places:
        """Copy all but `borders` to `device`, without waiting for it."""
        return Places(
            to_device(self.rows, device),
            to_device(self.token_ids, device),
            to_device(self.position_ids, device),
            self.borders,
            tuple(
                Chains(chain.blocks.to(device), to_device(chain.context, device))
                for chain in self.chains
            ),
            self.learning.to(device),
        )


def sample_places(
    tokens: TokenBatch, config: PEagleConfig, *, generator: torch.Generator | None
) -> Places:
    """Draw the places of one micro-batch; the tensors of `tokens` and the generator are on the CPU.

    One number is drawn for each anchor that could go on, at each depth.
    """
    borders = tokens.cu_seqlens.to(torch.int64)
    lengths = borders.diff()
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    positions = torch.arange(tokens.num_tokens)
    end = borders[1:].repeat_interleave(lengths)
    # Place t learns if token t + 2 is supervised.
    valid = (positions + 2 < end) & tokens.loss_mask.roll(-2)
    rows = _needed(valid, document, len(lengths)).nonzero().squeeze(1)
    length = _draw_chains(valid, document, end, config, generator)
    place = torch.full_like(positions, -1)
    place[rows] = torch.arange(len(rows))
    chains, base, total = [], torch.zeros_like(positions), len(rows)
    position_ids = [tokens.position_ids[rows]]
    for size in range(1, config.num_depths):
        anchors = (length == size).nonzero().squeeze(1)
        if not len(anchors):
            continue
        blocks = build_blocks(tokens, anchors + 1, block_size=size, mask_token_id=0)
        chains.append(Chains(blocks, place[blocks.context_rows]))
        base[anchors] = total + torch.arange(len(anchors)) * size
        total += len(anchors) * size
        position_ids.append(blocks.position_ids)
    counts = torch.bincount(document[rows], minlength=len(lengths))
    return Places(
        rows=rows,
        token_ids=tokens.token_ids[(rows + 1).clamp(max=max(tokens.num_tokens - 1, 0))],
        position_ids=torch.cat(position_ids),
        borders=torch.cat([counts.new_zeros(1), counts[counts > 0].cumsum(0)]).to(torch.int32),
        chains=tuple(chains),
        learning=_learning(valid, length, place, base, config.num_depths, tokens),
    )


def _needed(valid: Tensor, document: Tensor, number: int) -> Tensor:
    """Return which depth-0 places somebody needs: all up to the last that learns, [T] bool."""
    positions = torch.arange(len(valid))
    last = torch.full((number,), -1).scatter_reduce(
        0, document, torch.where(valid, positions, -1), "amax"
    )
    return positions <= last[document]


def _draw_chains(
    valid: Tensor,
    document: Tensor,
    end: Tensor,
    config: PEagleConfig,
    generator: torch.Generator | None,
) -> Tensor:
    """Return how deep each anchor goes, [T] int64."""
    number = int(document.max()) + 1 if len(document) else 0
    learning = torch.bincount(document[valid], minlength=number)
    length = torch.zeros_like(document)
    alive = torch.arange(len(valid))
    for depth in range(1, config.num_depths):
        alive = alive[alive + depth < end[alive]]
        alive = alive[valid[alive + depth]]
        share = max(config.keep_ratio**depth, config.keep_ratio_min)
        keep = ((learning - depth) * share).floor().clamp(min=0)
        owner = document[alive]
        keys = torch.rand(len(alive), dtype=torch.float64, generator=generator)
        order = (owner + keys).argsort()
        counts = torch.bincount(owner, minlength=number)
        first = (counts.cumsum(0) - counts)[owner]
        kept = torch.arange(len(alive)) - first < keep[owner]
        alive = alive[order[kept]].sort().values
        length[alive] = depth
    return length


def _learning(
    valid: Tensor,
    length: Tensor,
    place: Tensor,
    base: Tensor,
    num_depths: int,
    tokens: TokenBatch,
) -> Unroll:
    """Return who learns from which teacher row, depth after depth."""
    learners = valid.nonzero().squeeze(1)
    anchors = learners - torch.arange(num_depths)[:, None]
    # Chains never cross a border, so an anchor before one is never that deep.
    reached = length[anchors.clamp(min=0)] >= torch.arange(num_depths)[:, None]
    used = reached & (anchors >= 0)
    depth, slots = used.nonzero(as_tuple=True)
    anchor = anchors[depth, slots]
    counts = torch.zeros(num_depths, len(learners) + 1, dtype=torch.int64)
    counts[:, 1:] = used.cumsum(1)
    return Unroll(
        input_ids=tokens.token_ids[None],
        position_ids=tokens.position_ids,
        teacher_rows=learners + 1,
        positions=torch.where(depth == 0, place[anchor], base[anchor] + depth - 1),
        slots=slots,
        counts=counts,
    )
