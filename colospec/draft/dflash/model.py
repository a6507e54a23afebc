"""DFlash (arXiv 2602.06036): all slots of a block predict their own token, from its place alone.

Parameters have the names of public checkpoints; the embedding and the head are the target's.

Shape letters: H hidden size, N blocks of b slots, P supervised slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colospec.batch import FeatureBatch
from colospec.draft.anchors import Blocks
from colospec.draft.base import Choose, LossTerms, StepContext
from colospec.draft.cross_entropy import head_cross_entropy
from colospec.draft.dflash.backbone import BlockBackbone
from colospec.draft.dflash.config import BlockObjective, DFlashConfig
from colospec.draft.dflash.public import DFlashFormat
from colospec.draft.dflash.speculators import DFlashSpeculators
from colospec.draft.kv_cache import KVCache
from colospec.draft.rows import pick
from colospec.target import Target


class DFlash(BlockBackbone):
    """The draft, its loss, and its decoding."""

    public = DFlashFormat()
    more_formats = (DFlashSpeculators(),)
    config: DFlashConfig

    def __init__(self, config: DFlashConfig, target: Target) -> None:
        super().__init__(config, target)
        self.num_drafted = config.block_size - 1

    def forward(self, batch: FeatureBatch, context: StepContext) -> LossTerms:
        """Draft a block from each sampled anchor and compare it with the text.

        The loss is a sum whose denominator is not known before all trainers have drawn anchors.
        """
        aux, config = batch.features.aux_hidden_states, self.config
        blocks = self.sample_blocks(batch.tokens, context.generator)[1].to(aux.device)
        states = self.unroll(aux, blocks)
        losses, right = head_cross_entropy(
            self.norm(pick(states, blocks.slots)),
            self.frozen_head,
            blocks.labels,
            chunk_tokens=config.chunk_tokens,
        )
        weights, denominator = self._weights(losses.detach(), blocks)
        loss = (weights * losses).sum()
        metrics = {"loss": (loss.detach(), denominator)}
        hits = losses.new_zeros(config.block_size - 1)
        hits.index_add_(0, blocks.places, right.to(hits.dtype))
        for place, count in enumerate(blocks.counts):
            metrics[f"acc_{place}"] = (hits[place], hits.new_full((), float(count)))
        return LossTerms(loss, metrics, denominator)

    def draft(
        self, token_id: Tensor, caches: list[KVCache], *, num_tokens: int, choose: Choose
    ) -> Tensor:
        head = self.frozen_head
        states = self.read_block(token_id, caches)[1 : num_tokens + 1]
        return choose(states.to(head.dtype) @ head.T)

    def _weights(self, losses: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Return the weight of each supervised slot [P], and what their sum is divided by."""
        config = self.config
        if config.objective is BlockObjective.decay:
            weights = self.decay(blocks.places, losses.dtype)
            return weights, weights.sum()
        grid = (len(blocks.lengths), blocks.size - 1)
        index = blocks.slots // blocks.size * grid[1] + blocks.places
        valid = losses.new_zeros(grid).view(-1).index_fill_(0, index, 1.0).view(grid)
        odds = torch.lerp(torch.exp(-losses), torch.ones_like(losses), config.dpace_alpha)
        prefix = losses.new_ones(grid).view(-1).index_copy_(0, index, odds).view(grid).cumprod(1)
        later = (prefix * valid).flip(1).cumsum(1).flip(1)
        return later.view(-1)[index], losses.new_full((), float(grid[0]))
