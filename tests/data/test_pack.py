"""The plan: every sample once per epoch, full bins, and one order for every split."""

import time
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colospec.data import pack
from colospec.data.pack import Plan, best_fit

BUDGET = 512


def log_normal(num_samples, seed=0, longest=BUDGET):
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(4.0, 0.8, num_samples).astype(np.int64), 1, longest)


def plan(lengths, seed=0, max_sequences=128, budget=BUDGET, fingerprint="data", sizes=None):
    return Plan(
        lengths,
        (lengths + 1) // 2,
        seed=seed,
        token_budget=budget,
        max_sequences=max_sequences,
        fingerprint=fingerprint,
        sizes=sizes,
    )


lengths_of_samples = st.lists(st.integers(1, BUDGET), min_size=1, max_size=200).map(np.array)


@settings(deadline=None, max_examples=60)
@given(lengths_of_samples, st.integers(0, 2**63), st.integers(1, 9), st.integers(0, 3))
def test_each_epoch_has_every_sample_once_within_both_limits(lengths, seed, max_sequences, epoch):
    bins = list(plan(lengths, seed, max_sequences).bins(epoch))
    assert sorted(chain(*bins)) == list(range(len(lengths)))
    for samples in bins:
        assert 1 <= len(samples) <= max_sequences
        assert lengths[list(samples)].sum() <= BUDGET


@settings(deadline=None, max_examples=60)
@given(lengths_of_samples, st.integers(0, 2**32), st.integers(0, 3))
def test_samples_that_take_more_than_their_tokens_share_a_bin_with_fewer(lengths, seed, epoch):
    sizes = np.random.default_rng(seed).integers(lengths, BUDGET, endpoint=True)
    it = plan(lengths, seed, sizes=sizes)
    bins = list(it.bins(epoch))
    assert sorted(chain(*bins)) == list(range(len(lengths)))
    assert all(sizes[list(samples)].sum() <= BUDGET for samples in bins)
    assert it.estimate_steps(2, 3) == len(list(it.steps(micro_batches_per_step=2, epochs=3)))
    first = list(it.bins(0))
    assert it.fill_rate() == pytest.approx(lengths.sum() / (len(first) * BUDGET)), "of tokens"


@settings(deadline=None, max_examples=60)
@given(lengths_of_samples, st.integers(1, 9), st.integers(1, 3))
def test_steps_hold_the_bins_in_order_whatever_their_number_per_step(lengths, per_step, epochs):
    it = plan(lengths)
    steps = list(it.steps(micro_batches_per_step=per_step, epochs=epochs))
    assert [step.step for step in steps] == list(range(len(steps)))
    assert all(len(step.bins) == per_step and step.bins[0] for step in steps)
    for epoch in range(epochs):
        of_epoch = [step for step in steps if step.epoch == epoch]
        bins = [samples for step in of_epoch for samples in step.bins if samples]
        assert bins == list(plan(lengths).bins(epoch))
        assert [step.micro_batch for step in of_epoch] == list(range(0, len(bins), per_step))
    for step in steps:
        samples = list(chain(*step.bins))
        assert step.num_loss_tokens == ((lengths[samples] + 1) // 2).sum()


@settings(deadline=None, max_examples=60)
@given(lengths_of_samples, st.integers(1, 9), st.integers(1, 9), st.data())
def test_resuming_continues_the_same_order_with_any_split(lengths, before, after, data):
    steps = list(plan(lengths).steps(micro_batches_per_step=before, epochs=3))
    taken = data.draw(st.integers(1, len(steps)))
    last = steps[taken - 1]
    rest = plan(lengths).steps(
        micro_batches_per_step=after,
        start_epoch=last.next_epoch,
        start_micro_batch=last.next_micro_batch,
        start_step=last.step + 1,
        epochs=3,
    )
    resumed = [*steps[:taken], *rest]
    order = [samples for step in resumed for samples in step.bins if samples]
    assert order == [samples for step in steps for samples in step.bins if samples]
    assert [step.step for step in resumed] == list(range(len(resumed)))


def test_bins_can_start_anywhere_also_behind_the_first_window(monkeypatch):
    monkeypatch.setattr(pack, "WINDOW_SAMPLES", 100)
    lengths = log_normal(1234)
    bins = list(plan(lengths).bins(2))
    for start in (0, 1, len(bins) // 3, len(bins) // 2, len(bins) - 1, len(bins), len(bins) + 5):
        assert list(plan(lengths).bins(2, start)) == bins[start:]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    lengths = log_normal(500)
    orders = [list(chain(*plan(lengths, seed).bins(epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    again = plan(lengths)
    list(again.bins(1))
    assert list(chain(*again.bins(0))) == orders[0]


def test_order_is_the_one_that_earlier_releases_drew():
    first = list(plan(np.arange(1, 41) * 10, budget=400).bins(0))[:3]
    assert first == [(39,), (31, 7), (20, 18)]


def test_bins_are_full_and_their_order_tells_nothing_of_length():
    lengths = log_normal(30_000)
    it = plan(lengths)
    bins = list(it.bins(0))
    assert lengths.sum() / (len(bins) * BUDGET) >= 0.98
    assert it.fill_rate() >= 0.98
    means = [lengths[list(samples)].mean() for samples in bins]
    assert abs(np.corrcoef(np.arange(len(bins)), means)[0, 1]) < 0.05


def test_many_short_samples_do_not_leave_bins_half_empty():
    rng = np.random.default_rng(5)
    short, long = rng.integers(5, 40, 4000), rng.integers(100, 300, 4000)
    assert plan(np.concatenate([short, long]), budget=8192).fill_rate() >= 0.98


def test_best_fit_leaves_the_least_room():
    assert best_fit([6, 5, 4, 3, 2], capacity=10, max_items=9) == [[0, 2], [1, 3, 4]]
    assert best_fit([6, 5, 4, 3, 2], capacity=10, max_items=2) == [[0, 2], [1, 3], [4]]


def test_digest_changes_with_everything_that_changes_the_order():
    lengths = log_normal(10)
    plans = [
        plan(lengths),
        plan(lengths, seed=1),
        plan(lengths, max_sequences=4),
        plan(lengths, budget=600),
        plan(lengths, fingerprint="other"),
        plan(lengths, sizes=lengths + 1),
    ]
    assert len({it.digest for it in plans}) == len(plans)
    assert plan(lengths).digest == plan(lengths, sizes=lengths.copy()).digest == plans[0].digest


@pytest.mark.parametrize("per_step", [1, 3, 8])
def test_estimate_is_exact_for_small_datasets(per_step):
    it = plan(log_normal(20_000))
    steps = list(it.steps(micro_batches_per_step=per_step, epochs=3))
    assert plan(log_normal(20_000)).estimate_steps(per_step, 3) == len(steps)


def test_estimate_of_a_large_dataset_comes_from_its_first_window(monkeypatch):
    monkeypatch.setattr(pack, "COUNTED_SAMPLES", 50_000)
    it = plan(log_normal(20_000))
    exact = [len(list(it.steps(micro_batches_per_step=4, epochs=n))) for n in (1, 7)]
    assert it.estimate_steps(4, 7) == pytest.approx(exact[1], rel=0.01)
    monkeypatch.setattr(pack, "COUNTED_SAMPLES", 10_000)
    assert it.estimate_steps(4, 1) == pytest.approx(exact[0], rel=0.01)


def test_the_first_step_of_a_million_samples_comes_at_once():
    lengths = log_normal(1_400_000, longest=4096) + 31
    start = time.monotonic()
    it = plan(lengths, budget=8192)
    first = next(it.steps(micro_batches_per_step=8, epochs=1))
    assert time.monotonic() - start < 2.0
    assert len(first.bins) == 8


def test_last_step_of_an_epoch_is_filled_with_empty_micro_batches():
    steps = list(plan(np.full(5, BUDGET)).steps(micro_batches_per_step=3, epochs=1))
    assert [len(step.bins) for step in steps] == [3, 3]
    assert steps[1].bins[2] == ()
    assert (steps[0].next_epoch, steps[0].next_micro_batch) == (0, 3)
    assert (steps[1].next_epoch, steps[1].next_micro_batch) == (1, 0)


def test_steps_are_lazy():
    endless = plan(np.full(5, BUDGET)).steps(micro_batches_per_step=2, epochs=2**31)
    assert [step.epoch for step in islice(endless, 7)] == [0, 0, 0, 1, 1, 1, 2]


def test_unusable_numbers_are_refused_with_the_setting_to_change():
    with pytest.raises(ValueError, match=r"600 tokens.*data\.token_budget=600"):
        plan(np.array([5, 600]))
    with pytest.raises(ValueError, match=r"600 tokens.*data\.token_budget=600"):
        plan(np.array([5, 6]), sizes=np.array([5, 600]))
    for wrong in ([5, 5], [5, 6, 7]):
        with pytest.raises(ValueError, match="no less than its length"):
            plan(np.array([5, 6]), sizes=np.array(wrong))
    with pytest.raises(ValueError, match="at least one sample"):
        plan(np.empty(0, np.int64))
    with pytest.raises(ValueError, match="seed=-1"):
        plan(np.array([5]), seed=-1)
    with pytest.raises(ValueError, match="micro_batches_per_step=0"):
        next(plan(np.array([5])).steps(micro_batches_per_step=0, epochs=1))
