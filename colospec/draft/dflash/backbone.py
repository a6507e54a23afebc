"""What all drafters of blocks are: layers that draft a block from the target's own states.

A few Qwen3-like layers read one token and b - 1 mask tokens together. Each layer also attends to
the target's states, projected once: they go through the layer's key and value projections, and
nothing else. The embedding and the head are the target's.

Shape letters: T tokens, A aux layers, H hidden size of target and draft, N blocks of b slots, C
context rows, V target vocabulary, D head size.
"""

from __future__ import annotations

from typing import Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from colospec.batch import FeatureSpec, TokenBatch
from colospec.config import DraftConfig
from colospec.draft.anchors import Blocks, build_blocks, sample_anchors
from colospec.draft.base import BlockDraft
from colospec.draft.block_attention import block_attention
from colospec.draft.dflash.config import BlockConfig
from colospec.draft.dflash.layers import block_layers
from colospec.draft.kv_cache import KVCache
from colospec.draft.layer import LayerShape, PlainLayer, init_linears
from colospec.draft.layers import chosen_mask_token
from colospec.draft.norm import RMSNorm
from colospec.draft.rope import Rope
from colospec.target import Target


class BlockBackbone(BlockDraft):
    """All but what is predicted from the states of the slots, and the loss."""

    config: BlockConfig

    def __init__(self, config: BlockConfig, target: Target) -> None:
        super().__init__()
        self.config = config
        self.mask_token_id = chosen_mask_token(config.mask_token_id, target)
        shape = LayerShape.of(target, config.intermediate_size)
        size, eps = shape.hidden_size, shape.eps
        self.rope = Rope(target)
        self.fc = nn.Linear(len(block_layers(config, target)) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(
            PlainLayer(shape, head_norms=True) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(size, eps)
        init_linears(self)

    @classmethod
    def features(cls, config: DraftConfig, target: Target) -> FeatureSpec:
        """Aux hidden states alone: labels are tokens, so no teacher is needed."""
        assert isinstance(config, BlockConfig)
        return FeatureSpec(
            aux_layer_ids=block_layers(config, target),
            last_hidden_states=False,
            hidden_size=target.hidden_size,
            dtype=target.dtype,
        )

    @classmethod
    def sizes(
        cls,
        config: DraftConfig,
        lengths: NDArray[np.int64],
        num_loss_tokens: NDArray[np.int64],
        *,
        token_budget: int,
    ) -> NDArray[np.int64]:
        """`max_blocks` blocks fill the budget, however few tokens they come from."""
        assert isinstance(config, BlockConfig)
        blocks = num_loss_tokens.clip(max=config.num_anchors)
        share = -(-blocks * token_budget // config.max_blocks)
        sizes: NDArray[np.int64] = np.maximum(lengths, share.clip(max=token_budget))
        return sizes

    @classmethod
    def from_config(
        cls, config: DraftConfig, target: Target, *, token_counts: np.ndarray | Tensor | None
    ) -> Self:
        del token_counts  # the vocabulary is the target's
        assert isinstance(config, BlockConfig)
        return cls(config, target)

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

    def sample_blocks(
        self, tokens: TokenBatch, generator: torch.Generator | None
    ) -> tuple[Tensor, Blocks]:
        """Return random anchors [N] and their blocks, on the CPU."""
        config = self.config
        anchors = sample_anchors(tokens, num_anchors=config.num_anchors, generator=generator)
        blocks = build_blocks(
            tokens, anchors, block_size=config.block_size, mask_token_id=self.mask_token_id
        )
        return anchors, blocks

    def decay(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Return how much drafted tokens weigh, by their places in the block [P]."""
        rate = 0.0 if self.config.decay_gamma is None else 1 / self.config.decay_gamma
        return torch.exp(places.to(dtype) * -rate)

    def project(self, aux_hidden_states: Tensor) -> Tensor:
        """Turn the target's aux hidden states [n, A * H] into the context [n, H] of all layers."""
        aux = aux_hidden_states.to(self.fc.weight.dtype)
        return self.hidden_norm(self.fc(aux))  # type: ignore[no-any-return]

    def start(self) -> list[KVCache]:
        return [KVCache() for _ in self.layers]

    def read(self, token_ids: Tensor, aux_hidden_states: Tensor, caches: list[KVCache]) -> None:
        del token_ids  # the context is of the target's states alone
        first = caches[0].length
        context = self.project(aux_hidden_states)
        positions = torch.arange(first, first + len(context), device=context.device)
        table = self.rope.table(positions)
        for layer, cache in zip(self._layers, caches, strict=True):
            cache.append(*layer.self_attn.keys_values(context, table))

    def read_block(self, token_id: Tensor, caches: list[KVCache]) -> Tensor:
        """Return the normed states [b, H] of a block that begins with `token_id` [1], the token
        behind all that `caches` have read; the caches stay as they are."""
        length, size = caches[0].length, self.config.block_size
        positions = torch.arange(length, length + size, device=token_id.device)
        table = self.rope.table(positions)
        masks = token_id.new_full((size - 1,), self.mask_token_id)
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
        return self.norm(states)  # type: ignore[no-any-return]

    @property
    def _layers(self) -> list[PlainLayer]:
        return cast(list[PlainLayer], list(self.layers))

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
