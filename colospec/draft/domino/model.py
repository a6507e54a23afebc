"""Domino (arXiv 2605.29707): DFlash whose logits are corrected by what the block said before.

A GRU reads the tokens of the block, and from the second drafted token on (by default) its state and
the slot's give low-rank logits that are added. In training it reads the text; in decoding the
chosen tokens, so logits come one after another, although the layers run once. The loss moves from
the uncorrected logits to the corrected ones.

Shape letters: G width of the GRU, E rank of the correction, N blocks of b slots, P supervised
slots.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colospec.batch import FeatureBatch
from colospec.draft.alignment import to_device
from colospec.draft.anchors import Blocks
from colospec.draft.base import Choose, LossTerms, StepContext
from colospec.draft.dflash.backbone import BlockBackbone
from colospec.draft.dflash.labels import block_text, shift_labels
from colospec.draft.domino.config import DominoConfig
from colospec.draft.domino.heads import PrefixGru
from colospec.draft.domino.losses import PairLosses, pair_losses
from colospec.draft.domino.public import DominoFormat
from colospec.draft.kv_cache import KVCache
from colospec.draft.layer import init_linears
from colospec.draft.rows import pick
from colospec.target import Target


class Domino(BlockBackbone):
    """The draft, its loss, and its decoding."""

    public = DominoFormat()
    config: DominoConfig

    def __init__(self, config: DominoConfig, target: Target) -> None:
        super().__init__(config, target)
        self.num_drafted = config.block_size - (not config.shift_label)
        size, width = target.hidden_size, config.gru_hidden_dim
        self.prefix_gru = PrefixGru(size, width)
        narrow = nn.Linear(size + width, config.emb_dim, bias=False)
        wide = nn.Linear(config.emb_dim, target.vocab_size, bias=False)
        self.embed_proj = nn.Sequential(narrow, nn.SiLU(), wide)
        init_linears(self.embed_proj)

    def forward(self, batch: FeatureBatch, context: StepContext) -> LossTerms:
        """Draft a block from each sampled anchor and compare it with the text.

        The loss is a sum whose denominator is not known before all trainers have drawn anchors.
        """
        aux, config = batch.features.aux_hidden_states, self.config
        anchors, planned = self.sample_blocks(batch.tokens, context.generator)
        text = block_text(batch.tokens, anchors, size=config.block_size)
        if config.shift_label:
            planned, _ = shift_labels(batch.tokens, anchors, planned, unbroken=False)
        blocks = planned.to(aux.device)
        hidden = self.norm(pick(self.unroll(aux, blocks), blocks.slots))
        embeds = self._embed(to_device(text, aux.device))
        read = self.prefix_gru(embeds.view(len(blocks.lengths), blocks.size, embeds.shape[1]))
        # The state after the token before the drafted one: that of the drafted one's place.
        before = blocks.slots // blocks.size * blocks.size + blocks.places
        latent = self._latent(hidden, pick(read.flatten(0, 1), before))
        corrected = blocks.places >= config.pure_draft_prefix_len
        weights = self.decay(blocks.places, torch.promote_types(hidden.dtype, torch.float32))
        losses = pair_losses(
            hidden,
            latent * corrected[:, None],
            self.frozen_head,
            cast(nn.Linear, self.embed_proj[2]).weight,
            blocks.labels,
            weights,
            base_share=base_share(config, context),
            chunk_tokens=config.chunk_tokens,
        )
        denominator = weights.sum()
        metrics = {"loss": (losses.total.detach(), denominator)} | _metrics(losses, blocks, weights)
        return LossTerms(losses.total, metrics, denominator)

    def draft(
        self, token_id: Tensor, caches: list[KVCache], *, num_tokens: int, choose: Choose
    ) -> Tensor:
        head, config = self.frozen_head, self.config
        first = config.block_size - self.num_drafted
        hidden = self.read_block(token_id, caches)[first : first + num_tokens]
        logits = hidden.to(head.dtype) @ head.T
        state = hidden.new_zeros(1, config.gru_hidden_dim)
        chosen = [token_id]
        for place in range(num_tokens):
            part = slice(place, place + 1)
            state = self.prefix_gru.step(self._embed(chosen[-1]), state)
            more = self.embed_proj[2](self._latent(hidden[part], state))
            is_corrected = place >= config.pure_draft_prefix_len
            chosen.append(choose(logits[part] + more if is_corrected else logits[part]))
        return torch.cat(chosen[1:])

    def _latent(self, hidden: Tensor, state: Tensor) -> Tensor:
        return F.silu(self.embed_proj[0](torch.cat([hidden, state], dim=-1)))


def base_share(config: DominoConfig, context: StepContext) -> float:
    """Return the uncorrected logits' share of the loss at this step."""
    steps = config.lambda_base_decay * context.total_steps
    return config.lambda_base_start * max(0.0, 1 - context.step / max(1.0, steps))


def _metrics(
    losses: PairLosses, blocks: Blocks, weights: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name the sums. A joint acceptance length is one and the number of right tokens up to the
    first wrong or unsupervised one, a mean over blocks."""
    metrics = {}
    width = len(blocks.counts)
    number = weights.new_full((), float(len(blocks.lengths)))
    index = blocks.slots // blocks.size * width + blocks.places
    for name, right in (("", losses.right), ("base_", losses.base_right)):
        grid = weights.new_zeros(len(blocks.lengths) * width)
        grid = grid.index_copy(0, index, right.to(weights.dtype)).view(-1, width)
        hits = grid.sum(0)
        for place, size in enumerate(blocks.counts):
            metrics[f"{name}acc_{place}"] = (hits[place], hits.new_full((), float(size)))
        metrics[f"{name}joint_acceptance_length"] = (grid.cumprod(1).sum() + number, number)
    return metrics
