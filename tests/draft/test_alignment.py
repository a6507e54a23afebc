"""The index maps, one position at a time."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colospec.batch import Cursor, TokenBatch
from colospec.draft.alignment import unroll
from colospec.draft.eagle3.config import Alignment


def pack(masks):
    ids, first = [], 100
    for mask in masks:
        ids.append(torch.arange(first, first + len(mask)))
        first += 1000
    return TokenBatch.pack(
        Cursor(0, 0, 0), range(len(masks)), ids, [torch.tensor(mask) for mask in masks]
    )


def by_hand(tokens, ttt_length, alignment):
    """(step, position, teacher row) of every supervised position, from the definition."""
    found = []
    borders = tokens.cu_seqlens.tolist()
    for step in range(ttt_length):
        for start, end in pairwise(borders):
            for position in range(start, end):
                teacher, label = position + 1 + step, position + 2 + step
                if alignment is Alignment.exact:
                    supervised = label < end and tokens.loss_mask[label]
                else:
                    supervised = teacher < end and tokens.loss_mask[position + step]
                if supervised:
                    found.append((step, position, teacher))
    return found


@settings(deadline=None, max_examples=60)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=5),
    ttt_length=st.integers(1, 8),
    alignment=st.sampled_from(list(Alignment)),
)
def test_supervised_positions_follow_the_definition(masks, ttt_length, alignment):
    tokens = pack(masks)

    rows = unroll(tokens, ttt_length=ttt_length, alignment=alignment)

    steps = torch.repeat_interleave(torch.arange(ttt_length), torch.tensor(rows.sizes))
    teachers = rows.teacher_rows[rows.slots]
    found = list(zip(steps.tolist(), rows.positions.tolist(), teachers.tolist(), strict=True))
    assert found == by_hand(tokens, ttt_length, alignment)
    for step, position, teacher in found:
        assert rows.input_ids[step, position] == tokens.token_ids[teacher]
        assert rows.counts[step, -1] == rows.sizes[step]


@pytest.mark.parametrize(
    ("alignment", "labels"), [(Alignment.exact, [2, 3]), (Alignment.eagle, [4])]
)
def test_alignments_differ_by_two_tokens(alignment, labels):
    tokens = pack([[False, False, True, True, False]])

    rows = unroll(tokens, ttt_length=1, alignment=alignment)

    # The eagle mask of token 3 would teach the token after the document.
    assert [row + 1 for row in rows.teacher_rows.tolist() if row + 1 < 5] == labels
