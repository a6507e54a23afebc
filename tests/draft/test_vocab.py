"""The pruned vocabulary."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colospec.draft.vocab import build_vocab_mapping


@given(st.lists(st.integers(0, 5), min_size=1, max_size=50), st.data())
def test_most_frequent_tokens_are_chosen_and_ties_go_to_the_lowest_ids(counts, data):
    size = data.draw(st.integers(1, len(counts)))

    t2d, d2t = build_vocab_mapping(np.array(counts), size)

    by_count = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    expected = sorted(by_count[:size])
    assert (d2t + torch.arange(size)).tolist() == expected
    assert t2d.nonzero().squeeze(1).tolist() == expected
    assert t2d.dtype is torch.bool
    assert d2t.dtype is torch.int64


def test_a_shortage_is_filled_with_the_lowest_unused_ids():
    counts = collections.Counter([7, 7, 4])
    t2d, d2t = build_vocab_mapping(torch.tensor([counts[i] for i in range(10)]), 5)

    assert t2d.nonzero().squeeze(1).tolist() == [0, 1, 2, 4, 7]
    assert d2t.tolist() == [0, 0, 0, 1, 3]


def test_more_draft_tokens_than_target_tokens_are_refused():
    with pytest.raises(ValueError, match="draft_vocab_size=9"):
        build_vocab_mapping(torch.ones(8), 9)
