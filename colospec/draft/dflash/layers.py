"""Which layers of the target a drafter of blocks reads."""

from __future__ import annotations

from colospec.draft.dflash.config import BlockConfig
from colospec.draft.layers import chosen_layers, spread_layers
from colospec.target import Target


def block_layers(config: BlockConfig, target: Target) -> tuple[int, ...]:
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
