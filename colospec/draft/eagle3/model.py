"""EAGLE-3 (arXiv 2503.01840): one decoder layer that continues the target's hidden states.

The draft reads the target's aux hidden states where they exist, and its own output afterwards.
Training-time test (TTT) trains it on its own output: the layer is unrolled `ttt_length` times, each
step one token further. Parameters have the names of public checkpoints.

Shape letters: T tokens, A aux layers, H target hidden size, D draft hidden size (equal to H), V and
W target and draft vocabulary, P supervised positions of all K steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colospec.batch import FeatureBatch
from colospec.draft.alignment import Unroll, to_device, unroll
from colospec.draft.attention import Documents, ttt_attention
from colospec.draft.base import ChainDraft, LossTerms, StepContext
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.eagle3.public import Eagle3Format
from colospec.draft.eagle3.speculators import Eagle3Speculators
from colospec.draft.kv_cache import KVCache
from colospec.draft.layer import DraftLayer, LayerShape
from colospec.draft.layers import eagle3_layers
from colospec.draft.norm import RMSNorm
from colospec.draft.pruned import PrunedDraft, step_metrics
from colospec.draft.rows import pick_each
from colospec.target import Target


class Eagle3(PrunedDraft, ChainDraft):
    """The draft, its loss, and its decoding."""

    public = Eagle3Format()
    more_formats = (Eagle3Speculators(),)
    config: Eagle3Config

    def __init__(
        self, config: Eagle3Config, target: Target, *, mapping: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__(config, target, mapping=mapping)
        shape = LayerShape.of(target, config.intermediate_size)
        size, num_aux = shape.hidden_size, len(eagle3_layers(config.aux_layer_ids, target))
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(size, shape.eps) for _ in range(num_aux))
        self.fc = nn.Linear(num_aux * size, size, bias=False)
        self.midlayer = DraftLayer(shape, norm_before_residual=config.norm_before_residual)
        self.add_head(target)

    def forward(self, batch: FeatureBatch, context: StepContext) -> LossTerms:
        """Unroll the draft over the micro-batch and compare every step with the target.

        `batch.tokens` is on the CPU, `batch.features` on the model's device. Empty micro-batches,
        and those without a supervised position, give zero gradients to all parameters.
        """
        config, last = self.config, batch.features.last_hidden_states
        assert last is not None
        rows = unroll(batch.tokens, ttt_length=config.ttt_length, alignment=config.alignment)
        rows = rows.to(last.device)
        states = self.unroll(batch, rows)
        picked = pick_each(states, rows.positions, rows.sizes)
        del states
        sums = self.compare(
            picked if config.norm_output else self.norm(picked),
            last,
            rows,
            step_weights=tuple(config.step_weight_decay**k for k in range(config.ttt_length)),
            kind=config.loss,
            lk_eta=config.lk_eta,
        )
        # The metric counts like the training loss, per True entry of the loss mask.
        metrics = step_metrics(sums, rows.sizes, int(batch.tokens.loss_mask.sum()))
        return LossTerms(sums.loss / max(1, context.num_loss_tokens), metrics)

    def unroll(self, batch: FeatureBatch, rows: Unroll) -> list[Tensor]:
        """Return the hidden states [T, D] of each TTT step, as the next step reads them.

        Rows past the end of a document mean nothing.
        """
        hidden = self.project(batch.features.aux_hidden_states)
        borders = batch.tokens.cu_seqlens
        documents = Documents(tuple(borders.tolist()), to_device(borders, hidden.device))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        states: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys.append(key)
            values.append(value)
            return ttt_attention(query, keys, values, documents)

        for step, input_ids in enumerate(rows.input_ids):
            table = self.rope.table(rows.position_ids + step)
            hidden = self._finish(self.midlayer(self._embed(input_ids), hidden, table, attend))
            states.append(hidden)
        return states

    def project(self, aux_hidden_states: Tensor) -> Tensor:
        aux = aux_hidden_states.to(self.fc.weight.dtype)
        if self.config.fc_norm:
            parts = aux.chunk(len(self.fc_norm), dim=-1)
            aux = torch.cat([n(part) for n, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return super().project(aux)

    def decode(
        self, token_ids: Tensor, hidden: Tensor, position_ids: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """Append n tokens to `cache` and return what the draft predicts after each.

        token_ids [n]: token t + 1 beside hidden state t; hidden [n, D]: from `project` or an
        earlier `decode`; position_ids [n]: t. Returns logits [n, W] (see `to_target_ids`) and the
        hidden states [n, D] to feed back.
        """
        table = self.rope.table(position_ids)
        out = self._finish(self.midlayer(self._embed(token_ids), hidden, table, cache.attend))
        return self.lm_head(out if self.config.norm_output else self.norm(out)), out

    def _finish(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) if self.config.norm_output else hidden
