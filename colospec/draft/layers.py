"""What a draft reads of the target: which layers, and which token as a mask."""

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


def eagle3_layers(wanted: Sequence[int] | None, target: Target) -> tuple[int, ...]:
    """Return the aux layers of a draft that reads what EAGLE-3 reads, ascending; `wanted` is the
    user's choice.

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


def spread_layers(number: int, target: Target) -> tuple[int, ...]:
    """Return up to `number` layers spread evenly from 0 to L - 2 of L; the last layer only if there
    are too few."""
    last = min(max(target.num_layers - 2, number - 1), target.num_layers - 1)
    return tuple(sorted({last * i // max(1, number - 1) for i in range(number)}))


def chosen_mask_token(wanted: int | None, target: Target) -> int:
    """Return the token that stands for one to be drafted; the default is the last row of the
    target's embedding, which most targets leave unused.

    Raises ValueError for one that the embedding does not have.
    """
    if wanted is None:
        return target.vocab_size - 1
    if wanted >= target.vocab_size:
        raise ValueError(
            f"draft.mask_token_id={wanted} is not in the target's embedding of "
            f"{target.vocab_size} tokens; null takes the last one"
        )
    return wanted
