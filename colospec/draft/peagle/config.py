"""The settings of P-EAGLE. No torch here: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass

from colospec.config import check_numbers
from colospec.draft.settings import PrunedConfig


@dataclass
class PEagleConfig(PrunedConfig):
    """P-EAGLE (arXiv 2602.01469)."""

    algorithm: str = "peagle"
    num_layers: int = 4
    """Layers of the draft; the first one is that of EAGLE-3."""
    num_depths: int = 8
    """Tokens that are drafted at once."""
    keep_ratio: float = 0.7
    """Share of the places at depth d that learn: keep_ratio ** d, drawn anew at each step."""
    keep_ratio_min: float = 0.2
    """Least share, however deep."""
    mask_token_id: int | None = None
    """Token that stands for one to be drafted; null is the last row of the target's embedding."""

    def check(self) -> None:
        super().check()
        check_numbers(
            self,
            prefix="draft.",
            at_least={"num_layers": 1, "num_depths": 1, "mask_token_id": 0},
            above_zero=("keep_ratio",),
            at_most_one=("keep_ratio", "keep_ratio_min"),
        )
