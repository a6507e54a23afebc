"""Which layers of the target EAGLE-3 reads, and P-EAGLE."""

from __future__ import annotations

from collections.abc import Sequence

from colospec.draft.layers import chosen_layers, spread_layers
from colospec.target import Target


def eagle3_layers(wanted: Sequence[int] | None, target: Target) -> tuple[int, ...]:
    """Return the aux layers, ascending; `wanted` is the user's choice.

    The default is [1, L // 2 - 1, L - 4]; where these are not distinct and ascending (L < 7), it is
    up to three layers spread evenly. Raises ValueError for layers that the target does not have.
    """
    if wanted is not None:
        return chosen_layers(wanted, target)
    num_layers = target.num_layers
    default = (1, num_layers // 2 - 1, num_layers - 4)
    if default[0] < default[1] < default[2]:
        return default
    return spread_layers(3, target)
