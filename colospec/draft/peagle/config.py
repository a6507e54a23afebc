"""The settings of P-EAGLE. No torch here: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass

from colospec.config import DraftConfig, check_numbers


@dataclass
class PEagleConfig(DraftConfig):
    """P-EAGLE (arXiv 2602.01469)."""

    algorithm: str = "peagle"
    aux_layer_ids: list[int] | None = None
    """Target layers whose outputs feed the draft, 0-based; null is [1, L // 2 - 1, L - 4]."""
    num_layers: int = 4
    """Layers of the draft; the first one is that of EAGLE-3."""
    num_depths: int = 8
    """Tokens that are drafted at once."""
    keep_ratio: float = 0.7
    """Share of the places at depth d that learn: keep_ratio ** d, drawn anew at each step."""
    keep_ratio_min: float = 0.2
    """Least share, however deep."""
    draft_vocab_size: int | None = 32000
    """Size of the pruned vocabulary (most frequent supervised tokens); null keeps the target's."""
    intermediate_size: int | None = None
    """Width of the MLP; null copies the target's."""
    mask_token_id: int | None = None
    """Token that stands for one to be drafted; null is the last row of the target's embedding."""
    chunk_tokens: int | None = None
    """Supervised places per chunk of vocabulary head and loss; bounds their memory. Null is 2048
    on a CPU and 8192 on a GPU."""

    def check(self) -> None:
        super().check()
        check_numbers(
            self,
            prefix="draft.",
            at_least={
                "num_layers": 1,
                "num_depths": 1,
                "draft_vocab_size": 1,
                "intermediate_size": 1,
                "mask_token_id": 0,
                "chunk_tokens": 1,
            },
            above_zero=("keep_ratio",),
            at_most_one=("keep_ratio", "keep_ratio_min"),
        )
