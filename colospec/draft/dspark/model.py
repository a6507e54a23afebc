"""DSpark (arXiv 2607.05147): DFlash whose logits are corrected by the token before.

Slot k predicts token anchor + k + 1, so a block of b slots drafts b tokens. In training the token
before is that of the text; in decoding it is the one that was chosen, so logits come one after
another, although the layers run once. A confidence head learns how likely each token is to be
accepted: one minus half the distance between the two distributions.

Shape letters: H hidden size, R rank of the correction, N blocks of b slots, P supervised slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from colospec.batch import FeatureBatch, FeatureSpec
from colospec.config import DraftConfig
from colospec.draft.alignment import to_device
from colospec.draft.anchors import Blocks
from colospec.draft.base import Choose, LossTerms, StepContext
from colospec.draft.dflash.backbone import BlockBackbone
from colospec.draft.dflash.labels import block_text, share_rows, shift_labels
from colospec.draft.dspark.config import DSparkConfig
from colospec.draft.dspark.heads import ConfidenceHead, MarkovHead
from colospec.draft.dspark.losses import Rows, SlotLosses, slot_losses
from colospec.draft.dspark.public import DSparkFormat
from colospec.draft.dspark.speculators import DSparkSpeculators
from colospec.draft.kv_cache import KVCache
from colospec.draft.rows import pick
from colospec.target import Target


class DSpark(BlockBackbone):
    """The draft, its loss, and its decoding."""

    public = DSparkFormat()
    more_formats = (DSparkSpeculators(),)
    config: DSparkConfig

    def __init__(self, config: DSparkConfig, target: Target) -> None:
        super().__init__(config, target)
        self.num_drafted = config.block_size
        self.markov_head = MarkovHead(
            config.markov_head_type,
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            rank=config.markov_rank,
        )
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            more = config.markov_rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(target.hidden_size + more)

    @classmethod
    def features(cls, config: DraftConfig, target: Target) -> FeatureSpec:
        """Aux hidden states, and the last hidden states for the target's distribution."""
        return replace(super().features(config, target), last_hidden_states=True)

    def forward(self, batch: FeatureBatch, context: StepContext) -> LossTerms:
        """Draft a block from each sampled anchor and compare it with text and target.

        The loss is a sum whose denominator is not known before all trainers have drawn anchors.
        """
        config, last = self.config, batch.features.last_hidden_states
        assert last is not None
        anchors, plain = self.sample_blocks(batch.tokens, context.generator)
        shifted, rows = shift_labels(batch.tokens, anchors, plain, unbroken=True)
        planned, rows, asked = share_rows(shifted, rows)
        previous = block_text(batch.tokens, anchors, size=config.block_size)
        blocks = planned.to(last.device)
        hidden = self.norm(self.unroll(batch.features.aux_hidden_states, blocks))
        embeds = self.markov_head.markov_w1(to_device(previous, last.device))
        latent = self.markov_head.unroll(embeds, hidden, size=blocks.size)
        hidden, embeds, latent = (pick(part, blocks.slots) for part in (hidden, embeds, latent))
        weights = self.decay(blocks.places, torch.promote_types(hidden.dtype, torch.float32))
        teacher = last.index_select(0, to_device(rows, last.device))
        losses = slot_losses(
            Rows(hidden, latent, teacher, asked, blocks.labels, weights),
            self.frozen_head,
            self.markov_head.markov_w2.weight,
            ce_weight=config.ce_weight,
            l1_weight=config.l1_weight,
            chunk_tokens=config.chunk_tokens,
        )
        loss, denominator = losses.total, weights.sum()
        accepted = (1 - losses.distance / 2).clamp(0, 1)
        metrics = _metrics(losses, accepted, weights, blocks)
        if self.confidence_head is not None:
            confidence = self._confidence(hidden, embeds)
            errors = F.binary_cross_entropy_with_logits(confidence, accepted, reduction="none")
            missed = weights @ errors
            loss = loss + config.confidence_weight * missed
            off = (confidence.detach().sigmoid() - accepted).abs()
            metrics["confidence"] = (missed.detach(), denominator)
            metrics["confidence_error"] = (weights @ off, denominator)
        metrics["loss"] = (loss.detach(), denominator)
        return LossTerms(loss, metrics, denominator)

    def draft(
        self, token_id: Tensor, caches: list[KVCache], *, num_tokens: int, choose: Choose
    ) -> Tensor:
        head, markov = self.frozen_head, self.markov_head
        hidden = self.read_block(token_id, caches)[:num_tokens]
        logits = hidden.to(head.dtype) @ head.T
        state = hidden.new_zeros(1, markov.rank)
        chosen = [token_id]
        for slot in range(num_tokens):
            part = slice(slot, slot + 1)
            latent, state = markov.step(markov.markov_w1(chosen[-1]), hidden[part], state)
            chosen.append(choose(logits[part] + markov.markov_w2(latent)))
        return torch.cat(chosen[1:])

    def _confidence(self, hidden: Tensor, embeds: Tensor) -> Tensor:
        assert self.confidence_head is not None
        with_markov = self.config.confidence_head_with_markov
        features = torch.cat([hidden, embeds], dim=-1) if with_markov else hidden
        return self.confidence_head(features)  # type: ignore[no-any-return]


def _metrics(
    losses: SlotLosses, accepted: Tensor, weights: Tensor, blocks: Blocks
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name the sums; `tau_probabilistic` is how many tokens a sampled block gains, on average, the
    bonus token included."""

    def count(number: int) -> Tensor:
        return weights.new_full((), float(number))

    total = weights.sum()
    grid = accepted.new_zeros(len(blocks.lengths) * blocks.size)
    gained = grid.index_copy(0, blocks.slots, accepted).view(-1, blocks.size).cumprod(1).sum()
    number = count(len(blocks.lengths))
    metrics = {
        "cross_entropy": (weights @ losses.cross_entropy, total),
        "distance": (weights @ losses.distance, total),
        "teacher_agreement": (losses.agrees.to(weights.dtype).sum(), count(len(blocks.slots))),
        "tau_probabilistic": (gained + number, number),
    }
    hits, rates = weights.new_zeros(blocks.size), weights.new_zeros(blocks.size)
    hits.index_add_(0, blocks.places, losses.right.to(hits.dtype))
    rates.index_add_(0, blocks.places, accepted)
    for place, size in enumerate(blocks.counts):
        metrics[f"acc_{place}"] = (hits[place], count(size))
        metrics[f"acceptance_rate_{place}"] = (rates[place], count(size))
    return metrics
