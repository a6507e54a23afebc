"""The settings that several algorithms share. No torch here: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colospec.config import DraftConfig, check_numbers


class Loss(Enum):
    """kl: forward KL to the target; lk_alpha, lk_lambda: arXiv 2602.23881."""

    kl = "kl"
    lk_alpha = "lk_alpha"
    lk_lambda = "lk_lambda"


@dataclass
class LayersConfig(DraftConfig):
    """What every draft made of decoder layers has."""

    intermediate_size: int | None = None
    """Width of the MLP; null copies the target's."""
    chunk_tokens: int | None = None
    """Supervised places per chunk of vocabulary head and loss; bounds their memory. Null is 2048
    on a CPU and 8192 on a GPU."""

    def check(self) -> None:
        super().check()
        check_numbers(self, prefix="draft.", at_least={"intermediate_size": 1, "chunk_tokens": 1})


@dataclass
class PrunedConfig(LayersConfig):
    """What every draft with a head of its own has."""

    aux_layer_ids: list[int] | None = None
    """Target layers whose outputs feed the draft, 0-based; null is [1, L // 2 - 1, L - 4]."""
    draft_vocab_size: int | None = 32000
    """Size of the pruned vocabulary (most frequent supervised tokens); null keeps the target's."""

    def check(self) -> None:
        super().check()
        check_numbers(self, prefix="draft.", at_least={"draft_vocab_size": 1})
