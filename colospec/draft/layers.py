"""Which layers of the target a draft reads."""

from __future__ import annotations

from collections.abc import Sequence

from colospec.config import DFlashConfig, Eagle3Config
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


def eagle3_layers(config: Eagle3Config, target: Target) -> tuple[int, ...]:
    """Return the aux layers, ascending.

    The default is [1, L // 2 - 1, L - 4]; where these are not distinct and ascending (L < 7), it is
    up to three layers spread evenly. Raises ValueError for layers that the target does not have.
    """
    if config.aux_layer_ids is not None:
        return chosen_layers(config.aux_layer_ids, target)
    num_layers = target.num_layers
    default = (1, num_layers // 2 - 1, num_layers - 4)
    if default[0] < default[1] < default[2]:
        return default
    return spread_layers(3, target)


def dflash_layers(config: DFlashConfig, target: Target) -> tuple[int, ...]:
    """Return the aux layers, ascending.

    The default is A = num_aux_layers of them from 1 to L - 3, spread evenly (L // 2 for one); where
    these are not distinct, up to A from 0 on. Raises ValueError for layers that the target does not
    have.
    """
    if config.aux_layer_ids is not None:
        return chosen_layers(config.aux_layer_ids, target)
    number, num_layers = config.num_aux_layers, target.num_layers
    if number == 1:
        return (num_layers // 2,)
    default = [round(1 + i * (num_layers - 4) / (number - 1)) for i in range(number)]
    if num_layers > 4 and len(set(default)) == number:
        return tuple(default)
    return spread_layers(min(number, max(1, num_layers - 1)), target)
