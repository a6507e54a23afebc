"""The settings of Domino. No torch here: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass

from colospec.config import check_numbers
from colospec.draft.dflash.config import BlockConfig


@dataclass
class DominoConfig(BlockConfig):
    """Domino (arXiv 2605.29707). No released engine serves it yet: for training and research."""

    algorithm: str = "domino"
    shift_label: bool = True
    """Let slot k predict token k + 1 of the block, so that b slots draft b tokens; without it slot
    k predicts its own token, as in DFlash."""
    gru_hidden_dim: int = 1024
    """Width of the recurrent state that reads the tokens of the block."""
    emb_dim: int = 256
    """Rank of the correction."""
    pure_draft_prefix_len: int = 1
    """So many tokens of a block are not corrected."""
    lambda_base_start: float = 1.0
    """Share of the loss that is the uncorrected logits' at the first step; it falls to 0."""
    lambda_base_decay: float = 0.5
    """Share of all steps over which it falls."""

    def check(self) -> None:
        super().check()
        check_numbers(
            self,
            prefix="draft.",
            at_least={"gru_hidden_dim": 1, "emb_dim": 1, "pure_draft_prefix_len": 0},
            above_zero=("lambda_base_decay",),
            at_most_one=("lambda_base_start", "lambda_base_decay"),
        )
        drafted = self.block_size - (not self.shift_label)
        if self.pure_draft_prefix_len >= drafted:
            raise ValueError(
                f"draft.pure_draft_prefix_len={self.pure_draft_prefix_len} leaves none of the "
                f"{drafted} drafted tokens to be corrected; lower it"
            )
