"""The settings of DFlash, and those that its variants share. No torch here: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from colospec.config import check_numbers
from colospec.draft.settings import LayersConfig


class BlockObjective(Enum):
    """How the slots of a block are weighted: decay falls with their place; dpace (arXiv 2605.18810)
    follows how likely the draft is to be right up to them."""

    decay = "decay"
    dpace = "dpace"


@dataclass
class BlockConfig(LayersConfig):
    """What every drafter of blocks has."""

    sized_by: ClassVar[tuple[str, ...]] = ("draft.max_blocks",)
    aux_layer_ids: list[int] | None = None
    """Target layers whose outputs feed the draft, 0-based; null spreads `num_aux_layers` of them
    evenly from 1 to L - 3."""
    num_aux_layers: int = 5
    num_layers: int = 5
    """Layers of the draft."""
    block_size: int = 16
    """Tokens that the draft reads at once: one that is given, and masks."""
    num_anchors: int = 512
    """Most blocks of one sample in one step, begun at random supervised tokens."""
    max_blocks: int = 1024
    """Blocks per micro-batch: sizes activations. Where samples have many, a micro-batch holds fewer
    tokens than data.token_budget; a sample that alone has more blocks is alone in its own."""
    mask_token_id: int | None = None
    """Token that stands for one to be drafted; null is the last row of the target's embedding."""
    sliding_layers: list[int] = field(default_factory=list)
    """Layers of the draft that see `sliding_window` tokens back and are causal inside a block."""
    sliding_window: int | None = None
    decay_gamma: float | None = 7.0
    """The k-th drafted token weighs exp(-(k - 1) / decay_gamma); null weighs all alike."""

    def check(self) -> None:
        super().check()
        check_numbers(
            self,
            prefix="draft.",
            at_least={
                "num_aux_layers": 1,
                "num_layers": 1,
                "block_size": 2,
                "num_anchors": 1,
                "max_blocks": 1,
                "mask_token_id": 0,
                "sliding_window": 1,
            },
            above_zero=("decay_gamma",),
        )
        layers = self.sliding_layers
        if any(not 0 <= layer < self.num_layers for layer in layers):
            raise ValueError(
                f"draft.sliding_layers={layers} must be layers of the draft, 0 to "
                f"{self.num_layers - 1}"
            )
        if bool(layers) != (self.sliding_window is not None):
            raise ValueError(
                f"draft.sliding_layers={layers} and draft.sliding_window={self.sliding_window} "
                "need each other; set both, or neither"
            )


@dataclass
class DFlashConfig(BlockConfig):
    """DFlash (arXiv 2602.06036)."""

    algorithm: str = "dflash"
    objective: BlockObjective = BlockObjective.decay
    dpace_alpha: float = 0.5
    """dpace: how far the draft's probabilities are pulled towards 1; decay_gamma is not used."""

    def check(self) -> None:
        super().check()
        check_numbers(self, prefix="draft.", at_most_one=("dpace_alpha",))
