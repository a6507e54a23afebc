"""DFlash (arXiv 2602.06036): a block of tokens drafted at once, from the target's own states.

A few Qwen3-like layers read one token and b - 1 mask tokens, and predict all b - 1 together. Each
layer also attends to the target's states, projected once: they go through the layer's key and value
projections, and nothing else. The embedding and the head are the target's. Parameters have the
names of public checkpoints.

Shape letters: T tokens, A aux layers, H hidden size of target and draft, N blocks of b slots, C
context rows, P supervised slots, V target vocabulary, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colospec.batch import FeatureBatch, FeatureSpec
from colospec.config import BlockObjective, DFlashConfig, DraftConfig
from colospec.draft.anchors import Blocks, build_blocks, sample_anchors
from colospec.draft.base import BlockDraft, LossTerms, StepContext
from colospec.draft.block_attention import block_attention
from colospec.draft.cross_entropy import head_cross_entropy
from colospec.draft.dflash_public import DFlashFormat, mask_token_id
from colospec.draft.layer import MLP, KVCache, LayerShape, RMSNorm, init_linears
from colospec.draft.layers import dflash_layers
from colospec.draft.rope import Rope
from colospec.draft.rows import linears, norm_rotate, pick
from colospec.target import Target

Table = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class BlockAttention(nn.Module):
    """Projections with normed queries and keys, as in Qwen3; who sees what is the caller's."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        size, width = shape.hidden_size, shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(size, width, bias=False)
        self.k_proj = nn.Linear(size, kv_width, bias=False)
        self.v_proj = nn.Linear(size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.eps)

    def keys_values(self, states: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """Return keys, rotated, and values [n, M, D] of states [n, H]: context or slots."""
        key, value = linears(states, (self.k_proj.weight, self.v_proj.weight))
        return norm_rotate(key, self.k_norm, table), self._heads(value)

    def forward(self, states: Tensor, table: Table, attend: Attend) -> Tensor:
        """Attend from slots [n, H]."""
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = linears(states, weights)
        query, key = norm_rotate(query, self.q_norm, table), norm_rotate(key, self.k_norm, table)
        out = attend(query, key, self._heads(value))
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(len(states), states.shape[1] // self.head_dim, self.head_dim)


class BlockLayer(nn.Module):
    """One decoder layer over the slots."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.self_attn = BlockAttention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, states: Tensor, table: Table, attend: Attend) -> Tensor:
        """Return the next states [n, H], before any norm."""
        states, normed = self.input_layernorm.add(states, None)
        branch = self.self_attn(normed, table, attend)
        states, normed = self.post_attention_layernorm.add(states, branch)
        return states + self.mlp(normed)  # type: ignore[no-any-return]


class DFlash(BlockDraft):
    """The draft, its loss, and its decoding."""

    config_type = DFlashConfig
    public = DFlashFormat()
    config: DFlashConfig

    def __init__(self, config: DFlashConfig, target: Target) -> None:
        super().__init__()
        self.config = config
        self.block_size = config.block_size
        self.mask_token_id = mask_token_id(config, target)
        shape = LayerShape.of(target, config.intermediate_size)
        size, eps = shape.hidden_size, shape.eps
        self.rope = Rope(target)
        self.fc = nn.Linear(len(dflash_layers(config, target)) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(BlockLayer(shape) for _ in range(config.num_layers))
        self.norm = RMSNorm(size, eps)
        init_linears(self)

    @classmethod
    def features(cls, config: DraftConfig, target: Target) -> FeatureSpec:
        """Aux hidden states alone: labels are tokens, so no teacher is needed."""
        assert isinstance(config, DFlashConfig)
        return FeatureSpec(
            aux_layer_ids=dflash_layers(config, target),
            last_hidden_states=False,
            hidden_size=target.hidden_size,
            dtype=target.dtype,
        )

    @classmethod
    def from_config(
        cls, config: DraftConfig, target: Target, *, token_counts: np.ndarray | Tensor | None
    ) -> Self:
        del token_counts  # the vocabulary is the target's
        assert isinstance(config, DFlashConfig)
        return cls(config, target)

    def forward(self, batch: FeatureBatch, context: StepContext) -> LossTerms:
        """Draft a block from each sampled anchor and compare it with the text.

        The loss is a sum whose denominator is not known before all trainers have drawn anchors.
        """
        aux, config = batch.features.aux_hidden_states, self.config
        anchors = sample_anchors(
            batch.tokens, num_anchors=config.num_anchors, generator=context.generator
        )
        blocks = build_blocks(
            batch.tokens,
            anchors,
            block_size=config.block_size,
            mask_token_id=self.mask_token_id,
        ).to(aux.device)
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

    def unroll(self, aux_hidden_states: Tensor, blocks: Blocks) -> Tensor:
        """Return the last layer's states [N * b, H] of all slots, before the final norm."""
        context = self.project(aux_hidden_states.index_select(0, blocks.context_rows))
        context_table = self.rope.table(blocks.context_positions)
        table = self.rope.table(blocks.position_ids)
        states = self._embed(blocks.input_ids)
        for number, layer in enumerate(self._layers):
            seen = layer.self_attn.keys_values(context, context_table)

            def attend(
                query: Tensor,
                key: Tensor,
                value: Tensor,
                seen: tuple[Tensor, Tensor] = seen,
                window: int | None = self._window(number),
            ) -> Tensor:
                return block_attention(query, seen, (key, value), blocks, window=window)

            states = layer(states, table, attend)
        return states

    def project(self, aux_hidden_states: Tensor) -> Tensor:
        """Turn the target's aux hidden states [n, A * H] into the context [n, H] of all layers."""
        aux = aux_hidden_states.to(self.fc.weight.dtype)
        return self.hidden_norm(self.fc(aux))  # type: ignore[no-any-return]

    def start(self) -> list[KVCache]:
        return [KVCache() for _ in self.layers]

    def read(self, aux_hidden_states: Tensor, caches: list[KVCache]) -> None:
        first = caches[0].length
        context = self.project(aux_hidden_states)
        positions = torch.arange(first, first + len(context), device=context.device)
        table = self.rope.table(positions)
        for layer, cache in zip(self._layers, caches, strict=True):
            cache.append(*layer.self_attn.keys_values(context, table))

    def draft(self, token_id: Tensor, caches: list[KVCache]) -> Tensor:
        length = caches[0].length
        positions = torch.arange(length, length + self.block_size, device=token_id.device)
        table = self.rope.table(positions)
        masks = token_id.new_full((self.block_size - 1,), self.mask_token_id)
        states = self._embed(torch.cat([token_id, masks]))
        for number, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            hidden = _hidden(positions, self._window(number))

            def attend(
                query: Tensor,
                key: Tensor,
                value: Tensor,
                cache: KVCache = cache,
                hidden: Tensor = hidden,
            ) -> Tensor:
                keys, values = cache.append(key, value)
                cache.truncate(length)
                out = F.scaled_dot_product_attention(
                    query.transpose(0, 1)[None],
                    keys.transpose(0, 1)[None],
                    values.transpose(0, 1)[None],
                    attn_mask=~hidden,
                    enable_gqa=True,
                )
                return out[0].transpose(0, 1)

            states = layer(states, table, attend)
        head = self.frozen_head
        return self.norm(states[1:]).to(head.dtype) @ head.T  # type: ignore[no-any-return]

    def _weights(self, losses: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Return the weight of each supervised slot [P], and what their sum is divided by."""
        config = self.config
        if config.objective is BlockObjective.decay:
            rate = 0.0 if config.decay_gamma is None else 1 / config.decay_gamma
            weights = torch.exp(blocks.places.to(losses.dtype) * -rate)
            return weights, weights.sum()
        grid = (len(blocks.lengths), blocks.size - 1)
        index = blocks.slots // blocks.size * grid[1] + blocks.places
        valid = losses.new_zeros(grid).view(-1).index_fill_(0, index, 1.0).view(grid)
        odds = torch.lerp(torch.exp(-losses), torch.ones_like(losses), config.dpace_alpha)
        prefix = losses.new_ones(grid).view(-1).index_copy_(0, index, odds).view(grid).cumprod(1)
        later = (prefix * valid).flip(1).cumsum(1).flip(1)
        return later.view(-1)[index], losses.new_full((), float(grid[0]))

    @property
    def _layers(self) -> list[BlockLayer]:
        return cast(list[BlockLayer], list(self.layers))

    def _window(self, layer: int) -> int | None:
        return self.config.sliding_window if layer in self.config.sliding_layers else None

    def _embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.embedding).to(self.fc.weight.dtype)


def _hidden(positions: Tensor, window: int | None) -> Tensor:
    """Return what slots at `positions` [b] do not see of all tokens up to the last one,
    [b, last + 1] bool; the context is everything before the first."""
    rows = torch.arange(int(positions[-1]) + 1, device=positions.device)
    asking = positions[:, None]
    if window is None:
        return (rows < 0).expand(len(positions), -1)
    return (rows > asking) | (rows <= asking - window)
