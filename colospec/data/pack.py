"""The plan: which samples form which micro-batch of which step.

A pure function of what the samples take of a micro-batch and of a few numbers, worked out lazily
and on every rank alike, so that engines and trainers agree without a word. One epoch: all samples
in an order drawn from (seed, epoch), cut into windows of about 8192; the samples of a window are
packed into bins of `token_budget` tokens (best fit, large samples first); the window's bins are
shuffled, because packing emits them by falling size. A bin is a micro-batch. Bins are numbered
through the epoch whatever the number of micro-batches per step, so trainers and accumulation trade
freely.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

WINDOW_SAMPLES = 8192
# Change the name with anything that changes which samples meet in which bin, or the bins' order.
ALGORITHM = "window-best-fit-1"
# Samples up to 1 / SMALL of the budget stay in drawn order: by falling size, the smallest of all
# would meet in bins that reach `max_sequences` half empty (short chats: fill 0.84 instead of 0.99).
SMALL = 16
# `estimate_steps` packs at most about this many samples (under 2 s).
COUNTED_SAMPLES = 2**19

Bin = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One optimizer step of the plan.

    `bins` has exactly `micro_batches_per_step` entries, the sample ids of each micro-batch; empty
    ones fill up an epoch's last step. `micro_batch` is the number of the first one in its epoch;
    micro-batch m of the step goes to trainer m % trainers. `num_loss_tokens` counts the supervised
    tokens of all bins. (`next_epoch`, `next_micro_batch`) is where the following step starts.
    """

    epoch: int
    step: int
    micro_batch: int
    bins: tuple[Bin, ...]
    num_loss_tokens: int
    next_epoch: int
    next_micro_batch: int


class Plan:
    """The order in which a dataset is gone through.

    lengths [N] and num_loss_tokens [N] are integers: tokens of each sample, and how many of them
    are supervised; sizes [N] (None: the lengths), what each takes of `token_budget`. `samples` are
    the ids to go through (None: all N); who gives some says so in `fingerprint`. Raises ValueError
    for no samples, or a sample that `token_budget` does not hold.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        num_loss_tokens: NDArray[np.integer],
        *,
        seed: int,
        token_budget: int,
        max_sequences: int,
        fingerprint: str,
        sizes: NDArray[np.integer] | None = None,
        samples: NDArray[np.integer] | None = None,
    ) -> None:
        sizes = lengths if sizes is None else sizes
        ids = np.arange(len(lengths)) if samples is None else samples.astype(np.intp)
        if len(ids) == 0:
            raise ValueError("a plan needs at least one sample; the dataset has none")
        if len(lengths) != len(num_loss_tokens):
            raise ValueError(f"{len(lengths)} lengths but {len(num_loss_tokens)} num_loss_tokens")
        if len(sizes) != len(lengths) or (sizes < lengths).any():
            raise ValueError("sizes must have one entry for each sample, no less than its length")
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        if (longest := int(sizes[ids].max())) > token_budget:
            raise ValueError(
                f"a sample of {longest} tokens fits no micro-batch of data.token_budget="
                f"{token_budget}; set data.token_budget={longest} or lower data.max_length"
            )
        self._ids = ids
        self._lengths = lengths
        self._sizes = sizes
        self._num_loss_tokens = num_loss_tokens
        self._seed = seed
        self._token_budget = token_budget
        self._max_sequences = max_sequences
        self._num_windows = math.ceil(len(ids) / WINDOW_SAMPLES)
        self._order: tuple[int, NDArray[np.intp]] | None = None  # of the epoch asked for last
        self._packed: tuple[tuple[int, int], list[Bin]] | None = None  # the window asked for last
        self._num_bins: dict[tuple[int, int], int] = {}  # of (epoch, window), once packed
        facts = [ALGORITHM, fingerprint, seed, token_budget, max_sequences]
        if not np.array_equal(sizes, lengths):
            facts.append(hashlib.sha256(sizes.astype(np.int64).tobytes()).hexdigest())
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._ids)

    def bins(self, epoch: int, start: int = 0) -> Iterator[Bin]:
        """Yield the sample ids of the epoch's micro-batches from number `start` on.

        The windows before `start` must be packed to know their number of bins, some 10 ms each.
        """
        first = 0
        for window in range(self._num_windows):
            count = self._count(epoch, window)
            if start < first + count:
                yield from self._window(epoch, window)[max(start - first, 0) :]
            first += count

    def steps(
        self,
        *,
        micro_batches_per_step: int,
        start_epoch: int = 0,
        start_micro_batch: int = 0,
        start_step: int = 0,
        epochs: int,
    ) -> Iterator[Step]:
        """Yield the steps from (start_epoch, start_micro_batch) to the end of epoch `epochs` - 1.

        A step never spans epochs. Resuming where an earlier step ended continues the very same
        order of samples, also with another `micro_batches_per_step`.
        """
        if micro_batches_per_step < 1:
            raise ValueError(f"micro_batches_per_step={micro_batches_per_step} must be at least 1")
        step, micro_batch = start_step, start_micro_batch
        for epoch in range(start_epoch, epochs):
            bins = self.bins(epoch, micro_batch)
            group = tuple(islice(bins, micro_batches_per_step))
            while group:
                following = tuple(islice(bins, micro_batches_per_step))
                end = micro_batch + len(group)
                filled = group + ((),) * (micro_batches_per_step - len(group))
                yield Step(
                    epoch=epoch,
                    step=step,
                    micro_batch=micro_batch,
                    bins=filled,
                    num_loss_tokens=sum(self._loss_tokens(samples) for samples in group),
                    next_epoch=epoch if following else epoch + 1,
                    next_micro_batch=end if following else 0,
                )
                step, micro_batch, group = step + 1, end, following
            micro_batch = 0

    def estimate_steps(self, micro_batches_per_step: int, epochs: int) -> int:
        """Return the number of steps of `epochs` epochs.

        Exact while no more than 2**19 samples are to be packed in all (65536 samples: 8 epochs);
        further epochs count as the mean of those counted, and an epoch too large to be counted
        is taken to fill its bins as the first window does. Equal on all ranks in any case.
        """
        size = self.num_samples
        counted = min(epochs, COUNTED_SAMPLES // size)
        if counted == 0:
            tokens = int(self._lengths[self._ids].sum())
            by_tokens = tokens / (self.fill_rate() * self._token_budget)
            return epochs * math.ceil(math.ceil(by_tokens) / micro_batches_per_step)
        steps = sum(
            math.ceil(self._count_epoch(epoch) / micro_batches_per_step) for epoch in range(counted)
        )
        return steps + round((epochs - counted) * steps / counted)

    def fill_rate(self) -> float:
        """Return the share of the first window's token budget that holds tokens, in (0, 1]."""
        bins = self._window(0, 0)
        tokens = sum(int(self._lengths[list(samples)].sum()) for samples in bins)
        return tokens / (len(bins) * self._token_budget)

    def _loss_tokens(self, samples: Bin) -> int:
        return int(self._num_loss_tokens[list(samples)].sum())

    def _count_epoch(self, epoch: int) -> int:
        return sum(self._count(epoch, window) for window in range(self._num_windows))

    def _count(self, epoch: int, window: int) -> int:
        if (epoch, window) not in self._num_bins:
            self._window(epoch, window)
        return self._num_bins[epoch, window]

    def _window(self, epoch: int, window: int) -> list[Bin]:
        """Pack one window and shuffle its bins."""
        key = (epoch, window)
        if self._packed is None or self._packed[0] != key:
            bins = self._pack(self._samples(epoch, window))
            shuffled = [bins[i] for i in shuffle(len(bins), self._seed, epoch, window)]
            self._packed = (key, shuffled)
            self._num_bins[key] = len(bins)
        return self._packed[1]

    def _samples(self, epoch: int, window: int) -> NDArray[np.intp]:
        """Return the sample ids of one window; the windows of an epoch differ by one at most."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, shuffle(len(self._ids), self._seed, epoch))
        start, end = (len(self._ids) * i // self._num_windows for i in (window, window + 1))
        return self._ids[self._order[1][start:end]]

    def _pack(self, samples: NDArray[np.intp]) -> list[Bin]:
        sizes = self._sizes[samples].astype(np.int64)
        order = np.argsort(-np.where(sizes > self._token_budget // SMALL, sizes, 0), kind="stable")
        ids = samples[order].tolist()
        bins = best_fit(
            sizes[order].tolist(), capacity=self._token_budget, max_items=self._max_sequences
        )
        return [tuple(ids[item] for item in items) for items in bins]


def shuffle(size: int, *key: int) -> NDArray[np.intp]:
    """Return a permutation of range(size) drawn from `key`.

    It sorts raw random bits: NumPy promises the bits of a BitGenerator for all versions, but not
    the order that Generator.permutation makes of them.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")


def best_fit(sizes: list[int], *, capacity: int, max_items: int) -> list[list[int]]:
    """Put each item, in the order given, into the open bin that it leaves the least room in.

    Returns the items' indices by bin.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # open bins by room left
    rooms = 0  # bit r is set where by_room[r] is not empty
    for item, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            index = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, index = capacity, len(bins)
            bins.append([])
        bins[index].append(item)
        left = room - size
        if left and len(bins[index]) < max_items:
            by_room[left].append(index)
            rooms |= 1 << left
    return bins
