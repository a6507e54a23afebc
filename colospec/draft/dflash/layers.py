"""What a drafter of blocks reads: which layers of the target, and which token as a mask."""

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


def mask_token_id(config: BlockConfig, target: Target) -> int:
    """Return the token that stands for one to be drafted; the default is the last row of the
    target's embedding, which most targets leave unused.

    Raises ValueError for one that the embedding does not have.
    """
    if config.mask_token_id is None:
        return target.vocab_size - 1
    if config.mask_token_id >= target.vocab_size:
        raise ValueError(
            f"draft.mask_token_id={config.mask_token_id} is not in the target's embedding of "
            f"{target.vocab_size} tokens; null takes the last one"
        )
    return config.mask_token_id
