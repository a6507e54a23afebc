"""What is held out is the same for the same data, is evaluated on whole, and never trained on."""

import random
from itertools import chain

import numpy as np
import pytest

from colospec.config import DataConfig
from colospec.data.dataset import prepare
from colospec.data.held_out import split
from colospec.data.pack import Plan
from tests.data import rows

BUDGET = 512


@pytest.fixture
def open_data(tmp_path, tokenizer_dirs):
    def open_data(path, **settings):
        config = DataConfig(
            path=str(path), max_length=BUDGET, token_budget=BUDGET, num_workers=1, **settings
        )
        dataset = prepare(
            config, tokenizer_path=tokenizer_dirs["chatml"], vocab_size=400, cache_dir=tmp_path
        )
        return dataset, config

    return open_data


def distinct(num_rows, seed):
    rng = random.Random(seed)
    return [{"text": f"{number} " + rows.sentence(rng, 60)} for number in range(num_rows)]


def texts(dataset, ids):
    return {tuple(dataset.sample(int(index))[0].tolist()) for index in ids}


def of_plan(dataset, parts, **settings):
    return Plan(
        dataset.lengths, dataset.num_loss_tokens, seed=3, token_budget=BUDGET, max_sequences=9,
        fingerprint=parts.fingerprint, samples=parts.train_ids, **settings,
    )  # fmt: skip


def test_held_out_samples_and_their_copies_are_in_no_micro_batch_of_any_epoch(tmp_path, open_data):
    data = distinct(90, seed=random.random())
    data += random.sample(data, 45)
    dataset, config = open_data(rows.write_lines(tmp_path / "a.jsonl", data), held_out_samples=20)
    parts = split(dataset, config, other=None)
    held_out = texts(dataset, parts.held_out.sample_ids)
    assert len(parts.held_out.sample_ids) == 20
    for epoch in range(3):
        trained = list(chain(*of_plan(dataset, parts).bins(epoch)))
        assert sorted(trained) == parts.train_ids.tolist()
        assert not texts(dataset, trained) & held_out
    assert texts(dataset, range(len(dataset))) == held_out | texts(dataset, parts.train_ids)


def test_token_counts_are_those_of_what_is_trained_on(tmp_path, open_data):
    path = rows.write_lines(tmp_path / "a.jsonl", rows.mixed(70))
    dataset, config = open_data(path, held_out_samples=30)
    parts = split(dataset, config, other=None)
    samples = [dataset.sample(int(index)) for index in parts.train_ids]
    supervised = np.concatenate([ids[mask].numpy() for ids, mask in samples])
    assert parts.token_counts.tolist() == np.bincount(supervised, minlength=400).tolist()


def test_every_held_out_sample_is_in_one_micro_batch_within_the_limits(tmp_path, open_data):
    path = rows.write_lines(tmp_path / "a.jsonl", rows.mixed(150))
    dataset, config = open_data(path, held_out_samples=60, max_sequences=7)
    sizes = np.random.default_rng().integers(dataset.lengths, BUDGET, endpoint=True)
    for taken, part in (
        (dataset.lengths, split(dataset, config, other=None)),
        (sizes, split(dataset, config, other=None, sizes=lambda _: sizes)),
    ):
        held_out = part.held_out
        assert sorted(chain(*held_out.bins)) == list(held_out.sample_ids)
        for samples in held_out.bins:
            assert 1 <= len(samples) <= 7
            assert taken[list(samples)].sum() <= BUDGET
    assert held_out.num_loss_tokens() == sum(
        int(dataset.sample(index)[1].sum()) for index in held_out.sample_ids
    )


def test_the_choice_follows_the_content_and_not_the_place(tmp_path, open_data):
    data = distinct(60, seed=random.random())
    (tmp_path / "other").mkdir()
    first, config = open_data(rows.write_lines(tmp_path / "a.jsonl", data), held_out_samples=9)
    second, _ = open_data(rows.write_lines(tmp_path / "other" / "b.jsonl", data))
    one, two = (split(dataset, config, other=None) for dataset in (first, second))
    assert one.held_out.sample_ids == two.held_out.sample_ids
    assert one.fingerprint == two.fingerprint
    changed, _ = open_data(rows.write_lines(tmp_path / "c.jsonl", [*data, {"text": "more"}]))
    assert split(changed, config, other=None).held_out.sample_ids != one.held_out.sample_ids


def test_the_plan_of_a_run_has_another_digest_with_other_samples_held_out(tmp_path, open_data):
    path = rows.write_lines(tmp_path / "a.jsonl", distinct(60, seed=1))
    digests = set()
    for number in (0, 5, 6):
        dataset, config = open_data(path, held_out_samples=number)
        digests.add(of_plan(dataset, split(dataset, config, other=None)).digest)
    assert len(digests) == 3


def test_a_file_of_its_own_is_held_out_whole_and_its_copies_are_not_trained_on(tmp_path, open_data):
    data = distinct(60, seed=random.random())
    path = rows.write_lines(tmp_path / "a.jsonl", data[:50])
    other, _ = open_data(rows.write_lines(tmp_path / "b.jsonl", data[40:]))
    dataset, config = open_data(path, held_out_path=str(tmp_path / "b.jsonl"))
    parts = split(dataset, config, other=other)
    assert parts.held_out.dataset is other
    assert parts.held_out.sample_ids == tuple(range(20))
    assert parts.train_ids.tolist() == list(range(40))
    some = DataConfig(**{**vars(config), "held_out_samples": 4})
    assert len(split(dataset, some, other=other).held_out.sample_ids) == 4


def test_nothing_asked_for_holds_nothing_out(tmp_path, open_data):
    dataset, config = open_data(rows.write_lines(tmp_path / "a.jsonl", rows.mixed(30)))
    parts = split(dataset, config, other=None)
    assert parts.held_out is None
    assert parts.fingerprint == dataset.fingerprint
    plan = of_plan(dataset, parts)
    assert sorted(chain(*plan.bins(0))) == list(np.arange(len(dataset)))


@pytest.mark.parametrize(
    ("number", "says"), [(31, "only 30 samples"), (30, "leaves nothing of data.path")]
)
def test_more_than_there_is_names_the_setting(tmp_path, open_data, number, says):
    path = rows.write_lines(tmp_path / "a.jsonl", distinct(30, seed=2))
    dataset, config = open_data(path, held_out_samples=number)
    with pytest.raises(ValueError, match=rf"data.held_out_samples={number}.*{says}"):
        split(dataset, config, other=None)
