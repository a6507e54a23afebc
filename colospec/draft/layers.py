"""Which layers of the target a draft reads: what algorithms choose from."""

from __future__ import annotations

from collections.abc import Sequence

from colospec.target import Target


def chosen_layers(wanted: Sequence[int], target: Target) -> tuple[int, ...]:
    """Return the aux layers that the user chose, ascending, which is the order in which inference
    engines capture them. Raises ValueError for layers that the target does not have."""
    if any(not 0 <= layer < target.num_layers for layer in wanted):
        raise ValueError(
            f"draft.aux_layer_ids={list(wanted)} names a layer outside the "
            f"target's 0..{target.num_layers - 1}; null takes the default"
        )
    return tuple(sorted(wanted))


def spread_layers(number: int, target: Target) -> tuple[int, ...]:
    """Return up to `number` layers spread evenly from 0 to L - 2 of L; the last layer only if there
    are too few."""
    last = min(max(target.num_layers - 2, number - 1), target.num_layers - 1)
    return tuple(sorted({last * i // max(1, number - 1) for i in range(number)}))
