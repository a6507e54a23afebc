"""The pruned vocabulary: which target tokens the draft can propose.

A draft that speaks only the most frequent tokens has a smaller head; the rest of the vocabulary
costs acceptance only where the target would have chosen it.

Shape letters: V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from colospec.target import Target


def choose_vocabulary(
    draft_vocab_size: int | None, target: Target, token_counts: np.ndarray | Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return the mapping of `build_vocab_mapping`; None where the draft keeps all of the target's
    tokens. Raises ValueError without the count of each token of the target."""
    if draft_vocab_size is None or draft_vocab_size >= target.vocab_size:
        return None
    if token_counts is None or len(token_counts) != target.vocab_size:
        found = "none" if token_counts is None else f"{len(token_counts)}"
        raise ValueError(
            f"draft.draft_vocab_size={draft_vocab_size} needs the count of each of the "
            f"target's {target.vocab_size} tokens among the supervised ones, and got {found}; "
            "count them in the data, or set draft.draft_vocab_size=null"
        )
    return build_vocab_mapping(token_counts, draft_vocab_size)


def build_vocab_mapping(
    token_counts: np.ndarray | Tensor, draft_vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Choose the `draft_vocab_size` (W) most frequent tokens.

    `token_counts` [V] counts every token among the supervised ones. Equal counts, and a shortage of
    tokens that occur, go to the lowest ids.

    Returns `t2d` [V] bool, True for the chosen, and `d2t` [W] int64, an offset: draft token i is
    target token i + d2t[i], ascending. These are the tensors that EAGLE-3 checkpoints carry.
    Raises ValueError where there are fewer than W tokens to choose from.
    """
    counts = torch.as_tensor(token_counts, device="cpu")
    if counts.ndim != 1 or draft_vocab_size > len(counts):
        raise ValueError(
            f"cannot choose draft_vocab_size={draft_vocab_size} tokens from token counts of shape "
            f"{list(counts.shape)}; lower draft.draft_vocab_size, or set it to null to keep the "
            "target's vocabulary"
        )
    by_count = torch.sort(counts, descending=True, stable=True).indices
    target_ids = by_count[:draft_vocab_size].sort().values
    t2d = torch.zeros(len(counts), dtype=torch.bool, device="cpu")
    t2d[target_ids] = True
    return t2d, target_ids - torch.arange(draft_vocab_size, device="cpu")
