"""The settings of EAGLE-3. No torch here: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colospec.config import check_numbers
from colospec.draft.settings import Loss, PrunedConfig


class Alignment(Enum):
    """Which positions learn: exact = those whose label is supervised; eagle = as the EAGLE code."""

    exact = "exact"
    eagle = "eagle"


@dataclass
class Eagle3Config(PrunedConfig):
    """EAGLE-3 (arXiv 2503.01840)."""

    algorithm: str = "eagle3"
    ttt_length: int = 7
    """Steps of training-time test: how often the draft is unrolled on itself."""
    step_weight_decay: float = 0.8
    """Weight of TTT step k is step_weight_decay ** k."""
    norm_output: bool = False
    """EAGLE-3.1: feed the normed hidden state to the next step."""
    fc_norm: bool = False
    """EAGLE-3.1: one RMSNorm per aux layer before the projection."""
    norm_before_residual: bool = False
    """Let the layer add to the normed hidden state, as many drafts of speculators do. vLLM serves
    it, SGLang does not: needs export.format=speculators."""
    loss: Loss = Loss.kl
    lk_eta: float = 3.0
    """lk_lambda: the weight of KL is exp(-lk_eta * acceptance)."""
    alignment: Alignment = Alignment.exact

    def check(self) -> None:
        super().check()
        check_numbers(
            self,
            prefix="draft.",
            at_least={"ttt_length": 1},
            above_zero=("step_weight_decay",),
            at_most_one=("step_weight_decay",),
        )
