"""Samples that are evaluated on and never trained on.

They are drawn by the data's fingerprint alone: the same data gives the same samples whatever the
seed, the modes and the number of ranks. Samples with the very tokens of a held-out one leave the
training set too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from colospec.config import DataConfig
from colospec.data.dataset import Dataset
from colospec.data.pack import Bin, best_fit, shuffle

Ids = NDArray[np.intp]


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples, ascending ids of `dataset`, and the micro-batches that they fill."""

    dataset: Dataset
    sample_ids: tuple[int, ...]
    bins: tuple[Bin, ...]

    def num_loss_tokens(self) -> int:
        """Return how many of their tokens are supervised."""
        return int(self.dataset.num_loss_tokens[list(self.sample_ids)].sum())


@dataclass(frozen=True)
class Split:
    """What is trained on, ascending ids (None: all samples), and how often each token [V] is
    supervised in it; what is held out; a fingerprint of both."""

    train_ids: Ids | None
    token_counts: NDArray[np.int64]
    held_out: HeldOut | None
    fingerprint: str


def split(
    train: Dataset,
    config: DataConfig,
    *,
    other: Dataset | None,
    sizes: Callable[[Dataset], NDArray[np.int64]] = lambda dataset: dataset.lengths,
) -> Split:
    """Hold out what `config` says of `train`, or of `other`, the data of held_out_path.

    `sizes` says what each sample of a dataset takes of data.token_budget, as for a `Plan`.

    Raises ValueError where too few samples are left, or too few are there.
    """
    number, source = config.held_out_samples, other or train
    if other is None and not number:
        return Split(None, train.token_counts, None, train.fingerprint)
    if number > len(source):
        raise ValueError(
            f"data.held_out_samples={number}, but there are only {len(source)} samples in "
            f"{config.path if other is None else config.held_out_path}; lower it"
        )
    chosen = _draw(source, number or len(source))
    train_ids = _without_copies(train, source, chosen)
    if not len(train_ids):
        raise ValueError(
            f"data.held_out_samples={number} leaves nothing of data.path={config.path} to train "
            f"on: all of its {len(train)} samples equal a held-out one; lower it, or set "
            "data.held_out_path to other data"
        )
    held_out = HeldOut(source, tuple(chosen.tolist()), _pack(chosen, sizes(source), config))
    return Split(
        train_ids,
        _token_counts(train, train_ids),
        held_out,
        _fingerprint(train, source, chosen, train_ids),
    )


def _draw(dataset: Dataset, number: int) -> Ids:
    digest = hashlib.sha256(f"held out/{dataset.fingerprint}".encode()).digest()
    order = shuffle(len(dataset), int.from_bytes(digest[:8], "little"))
    return np.sort(order[:number])


def _without_copies(train: Dataset, source: Dataset, chosen: Ids) -> Ids:
    """Return the samples of `train` whose tokens are not those of a chosen one."""
    # Only samples of the same length are read.
    alike = np.flatnonzero(np.isin(train.lengths, source.lengths[chosen]))
    known = {_content(source, index) for index in chosen.tolist()}
    copies = [index for index in alike.tolist() if _content(train, index) in known]
    return np.setdiff1d(np.arange(len(train)), np.array(copies, np.intp))


def _content(dataset: Dataset, index: int) -> bytes:
    tokens, _ = dataset.sample(index)
    return hashlib.sha256(tokens.numpy().tobytes()).digest()


def _token_counts(train: Dataset, train_ids: Ids) -> NDArray[np.int64]:
    """Take what is not trained on from the counts of all: a draft's vocabulary comes from them."""
    counts = train.token_counts.copy()
    for index in np.setdiff1d(np.arange(len(train)), train_ids).tolist():
        tokens, mask = train.sample(index)
        counts -= np.bincount(tokens[mask].numpy(), minlength=len(counts))
    return counts


def _pack(chosen: Ids, sizes: NDArray[np.int64], config: DataConfig) -> tuple[Bin, ...]:
    """Fill micro-batches, large samples first."""
    order = chosen[np.argsort(-sizes[chosen], kind="stable")].tolist()
    bins = best_fit(
        sizes[order].tolist(), capacity=config.token_budget, max_items=config.max_sequences
    )
    return tuple(tuple(order[item] for item in items) for items in bins)


def _fingerprint(train: Dataset, source: Dataset, chosen: Ids, train_ids: Ids) -> str:
    parts = (chosen.astype(np.int64).tobytes(), train_ids.astype(np.int64).tobytes())
    facts = [train.fingerprint, source.fingerprint, *map(_hash, parts)]
    return _hash("/".join(facts).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
