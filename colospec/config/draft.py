"""`draft.*`: what all draft algorithms have; each adds its own in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING


@dataclass
class DraftConfig:
    """What every draft algorithm has; each algorithm adds its own.

    `sized_by` names its settings that bound the memory of a step, as data.token_budget does.
    """

    sized_by: ClassVar[tuple[str, ...]] = ()

    algorithm: str = MISSING
    """Its name: that of its folder in colospec/draft, or of an entry point."""
    aux_layer_ids: list[int] | None = None
    """Target layers whose outputs feed the draft, 0-based; null is the algorithm's own choice."""

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        ids = self.aux_layer_ids
        if ids is not None and (not ids or len(set(ids)) != len(ids) or min(ids) < 0):
            raise ValueError(
                f"draft.aux_layer_ids={ids} must be distinct layers of the target, from 0; "
                "null takes the default"
            )
