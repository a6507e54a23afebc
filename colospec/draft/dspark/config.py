"""The settings of DSpark. No torch here: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colospec.config import check_numbers
from colospec.draft.dflash.config import BlockConfig


class MarkovHeadType(Enum):
    """What the correction by the token before depends on: vanilla on it alone, gated also on the
    state of the slot, rnn on all tokens of the block before."""

    vanilla = "vanilla"
    gated = "gated"
    rnn = "rnn"


@dataclass
class DSparkConfig(BlockConfig):
    """DSpark (arXiv 2607.05147). A block of b tokens drafts b, not b - 1."""

    algorithm: str = "dspark"
    block_size: int = 7
    decay_gamma: float | None = 4.0
    markov_rank: int = 256
    """Rank of the correction of the logits by the token before."""
    markov_head_type: MarkovHeadType = MarkovHeadType.vanilla
    enable_confidence_head: bool = True
    """Also learn how likely each token is to be accepted, which lets an engine verify fewer."""
    confidence_head_with_markov: bool = True
    """Let the confidence see the token before, too."""
    ce_weight: float = 0.1
    """Weight of the cross entropy with the text."""
    l1_weight: float = 0.9
    """Weight of the distance between the draft's and the target's distributions."""
    confidence_weight: float = 1.0

    def check(self) -> None:
        super().check()
        check_numbers(
            self,
            prefix="draft.",
            at_least={"markov_rank": 1, "ce_weight": 0},
            above_zero=("l1_weight", "confidence_weight"),
        )
