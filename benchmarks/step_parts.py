"""The parts of a step of Eagle3, alone, forward and backward: loss, attention, layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import flops
import torch
from step_case import Case
from step_clock import GIB
from torch import Tensor

from colospec.draft.alignment import unroll
from colospec.draft.attention import Documents, ttt_attention
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.eagle3.model import Eagle3
from colospec.draft.loss import LossSettings, Teacher, fused_loss


class Parts:
    """Those of a Case of Eagle3 that is not sharded."""

    def __init__(self, case: Case) -> None:
        self.case, self.config = case, cast(Eagle3Config, case.config)
        self.draft = cast(Eagle3, case.draft)
        self.num_tokens = case.tokens.num_tokens
        self.rows = unroll(
            case.tokens, ttt_length=self.config.ttt_length, alignment=self.config.alignment
        ).to(case.device)

    def runs(self) -> dict[str, Callable[[], None]]:
        """Return each part by name."""
        return {"loss": self.loss(), "attention": self.attention(), "layer": self.layer()}

    def loss(self) -> Callable[[], None]:
        """The vocabulary head and loss alone."""
        config, draft = self.config, self.draft
        hidden = self.case.leaf(len(self.rows.positions), self.case.target.hidden_size)
        weight = draft.lm_head.weight.detach().requires_grad_()
        last = self.case.batch.features.last_hidden_states
        assert last is not None
        teacher = Teacher(last, draft.frozen_head, draft.target_ids)
        weights = tuple(config.step_weight_decay**k for k in range(config.ttt_length))
        options = LossSettings(config.loss, config.lk_eta, weights, config.chunk_tokens)

        def run() -> None:
            sums = fused_loss(hidden, weight, teacher=teacher, rows=self.rows, settings=options)
            torch.autograd.grad(sums.loss, (hidden, weight))

        return run

    def attention(self) -> Callable[[], None]:
        """Attention of all steps, each with its own inputs."""
        target, leaf, steps = self.case.target, self.case.leaf, self.config.ttt_length
        query = leaf(self.num_tokens, target.num_attention_heads, target.head_dim)
        keys, values = (
            [
                leaf(self.num_tokens, target.num_key_value_heads, target.head_dim)
                for _ in range(steps)
            ]
            for _ in range(2)
        )
        borders = self.case.tokens.cu_seqlens
        documents = Documents(tuple(borders.tolist()), borders.to(self.case.device))

        def run() -> None:
            for step in range(1, steps + 1):
                inputs = (keys[:step], values[:step])
                out = ttt_attention(query, *inputs, documents)
                torch.autograd.grad(out, (query, *inputs[0], *inputs[1]), torch.ones_like(out))

        return run

    def layer(self) -> Callable[[], None]:
        """The layer without its attention, `ttt_length` times."""
        target, layer, shape = self.case.target, self.draft.midlayer, self._states
        embeds, hidden = self.case.normal(*shape), self.case.leaf(*shape)
        table = self.draft.rope.table(self.rows.position_ids)
        group = target.num_attention_heads // target.num_key_value_heads

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Uses all three, so that all have gradients.
            pair = (key + value).unsqueeze(2).expand(-1, -1, group, -1)
            return query + pair.reshape(query.shape)

        def run() -> None:
            for _ in range(self.config.ttt_length):
                out = layer(embeds, hidden, table, attend)
                torch.autograd.grad(out, (hidden, *layer.parameters()), torch.ones_like(out))

        return run

    def tera_flops(self) -> dict[str, float]:
        """Matrix products of the parts that are measured, in TFLOP."""
        lengths = self.case.tokens.cu_seqlens.diff().tolist()
        parts = flops.eagle3_parts(
            self.case.target, lengths,
            supervised=flops.Supervised.of(lengths, ttt_length=self.config.ttt_length),
            ttt_length=self.config.ttt_length, draft_vocab_size=self.config.draft_vocab_size,
        )  # fmt: skip
        return {name: parts[name] / 1e12 for name in ("loss", "attention", "layer")}

    def moved_gib(self) -> float:
        """Bytes that elementwise work must move in a step, every operand once per pass: logits
        (draft and teacher read, gradient written; the target's read), MLP (3 and 6 tensors), norms,
        rotation and residuals (about 30 tensors of hidden size)."""
        target, size = self.case.target, self.case.dtype.itemsize
        logits = 3 * len(self.rows.positions) * self.draft.lm_head.out_features
        logits += len(self.rows.teacher_rows) * target.vocab_size
        each = 9 * target.intermediate_size + 30 * target.hidden_size
        return (logits + self.num_tokens * self.config.ttt_length * each) * size / GIB

    @property
    def _states(self) -> tuple[int, int]:
        return self.num_tokens, self.case.target.hidden_size
