"""P-EAGLE (arXiv 2602.01469): EAGLE-3 that drafts all its tokens in one pass.

Where EAGLE-3 would read its own last state and token, P-EAGLE reads a mask token and one learned
state, so that all depths run together; a few plain layers make up for the steps. The embedding is
the target's. The mean of the loss is over all places that learn, also those whose token the pruned
vocabulary lacks, which add nothing. Parameters have the names of public checkpoints.

Shape letters: T tokens, A aux layers, H hidden size of target and draft, V and W target and draft
vocabulary, E places of all depths, R of depth 0, P that learn, K depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from colospec.batch import FeatureBatch
from colospec.draft.alignment import to_device
from colospec.draft.attention import Documents, ttt_attention
from colospec.draft.base import BlockDraft, Choose, LossTerms, StepContext
from colospec.draft.block_attention import block_attention
from colospec.draft.kv_cache import KVCache
from colospec.draft.layer import Attend, DraftLayer, LayerShape, PlainLayer
from colospec.draft.layers import chosen_mask_token, eagle3_layers
from colospec.draft.peagle.config import PEagleConfig
from colospec.draft.peagle.public import PEagleFormat
from colospec.draft.peagle.sampling import Places, sample_places
from colospec.draft.peagle.speculators import PEagleSpeculators
from colospec.draft.pruned import PrunedDraft, step_metrics
from colospec.draft.rows import pick
from colospec.target import Target

ALL = 2**30
"""A window wider than any document: a chain is causal, and sees all that is before it."""


class LastState(KVCache):
    """The first layer's cache, and what the draft said at the last place that it has read."""

    state: Tensor


class PEagle(PrunedDraft, BlockDraft):
    """The draft, its loss, and its decoding."""

    public = PEagleFormat()
    more_formats = (PEagleSpeculators(),)
    config: PEagleConfig

    def __init__(
        self, config: PEagleConfig, target: Target, *, mapping: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__(config, target, mapping=mapping)
        self.num_drafted = config.num_depths
        self.mask_token_id = chosen_mask_token(config.mask_token_id, target)
        shape = LayerShape.of(target, config.intermediate_size)
        width = len(eagle3_layers(config.aux_layer_ids, target)) * shape.hidden_size
        self.fc = nn.Linear(width, shape.hidden_size, bias=False)
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList([DraftLayer(shape)])
        self.layers.extend(PlainLayer(shape) for _ in range(config.num_layers - 1))
        self.add_head(target)

    def forward(self, batch: FeatureBatch, context: StepContext) -> LossTerms:
        """Draft from every place to the depths that are drawn, and compare with the target.

        The loss is a sum whose denominator is not known before all trainers have drawn depths.
        """
        config, last = self.config, batch.features.last_hidden_states
        assert last is not None
        planned = sample_places(batch.tokens, config, generator=context.generator)
        places = planned.to(last.device)
        learning = places.learning
        states = self.unroll(batch.features.aux_hidden_states, places)
        sums = self.compare(
            self.norm(pick(states, learning.positions)),
            last,
            learning,
            step_weights=(1.0,) * config.num_depths,
        )
        metrics = step_metrics(sums, learning.sizes, len(learning.positions))
        return LossTerms(sums.loss, metrics, metrics["loss"][1])

    def unroll(self, aux_hidden_states: Tensor, places: Places) -> Tensor:
        """Return the last layer's states [E, H] of all places, before the final norm."""
        first = self.project(aux_hidden_states.index_select(0, places.rows))
        sizes = [len(places.rows), *(len(chain.blocks.input_ids) for chain in places.chains)]
        masks = sum(sizes[1:])
        hidden = torch.cat([first, self._mask_state(masks)])
        embeds = torch.cat([self._embed(places.token_ids), self._mask_embeds(masks)])
        borders = places.borders
        documents = Documents(tuple(borders.tolist()), to_device(borders, first.device))

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = [torch.split(part, sizes) for part in (query, key, value)]
            queries, keys, values = parts
            found = [ttt_attention(queries[0], [keys[0]], [values[0]], documents)]
            for number, chain in enumerate(places.chains, start=1):
                rows = chain.context
                seen = pick(keys[0], rows), pick(values[0], rows)
                own = keys[number], values[number]
                found.append(block_attention(queries[number], seen, own, chain.blocks, window=ALL))
            return torch.cat(found)

        return self._run(embeds, hidden, places.position_ids, [attend] * len(self.layers))

    def start(self) -> list[KVCache]:
        return [LastState(), *(KVCache() for _ in self.layers[1:])]

    def read(self, token_ids: Tensor, aux_hidden_states: Tensor, caches: list[KVCache]) -> None:
        first = caches[0].length
        positions = torch.arange(first, first + len(token_ids), device=token_ids.device)
        states = self._run(
            self._embed(token_ids),
            self.project(aux_hidden_states),
            positions,
            [cache.attend for cache in caches],
        )
        cast(LastState, caches[0]).state = states[-1:]

    def draft(
        self, token_id: Tensor, caches: list[KVCache], *, num_tokens: int, choose: Choose
    ) -> Tensor:
        length, masks = caches[0].length, num_tokens - 1
        positions = torch.arange(length, length + masks, device=token_id.device)
        states = cast(LastState, caches[0]).state
        if masks:
            attends = [cache.attend for cache in caches]
            hidden = self._mask_state(masks)
            more = self._run(self._mask_embeds(masks), hidden, positions, attends)
            states = torch.cat([states, more])
            for cache in caches:
                cache.truncate(length)
        return choose(self.over_target_vocabulary(self.lm_head(self.norm(states))))

    def _run(
        self, embeds: Tensor, hidden: Tensor, position_ids: Tensor, attends: Sequence[Attend]
    ) -> Tensor:
        table = self.rope.table(position_ids)
        hidden = self.layers[0](embeds, hidden, table, attends[0])
        for layer, attend in zip(self.layers[1:], attends[1:], strict=True):
            hidden = layer(hidden, table, attend)
        return hidden

    def _mask_embeds(self, number: int) -> Tensor:
        row = self.embedding[self.mask_token_id : self.mask_token_id + 1]
        return row.to(self.fc.weight.dtype).expand(number, -1)

    def _mask_state(self, number: int) -> Tensor:
        return self.project(self.mask_hidden.flatten(0, 1)).expand(number, -1)
