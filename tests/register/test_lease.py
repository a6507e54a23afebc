"""A trainer learns only from features of the very tokens that its own plan names."""

from dataclasses import replace

import pytest
import torch

from colospec.batch import Cursor, FeatureSpec, TokenBatch
from colospec.ring.local import LocalChannel
from colospec.train.produce import check_lease

SPEC = FeatureSpec((0, 2), last_hidden_states=True, hidden_size=8, dtype=torch.float32)
CURSOR = Cursor(1, 5, 9)


def tokens(*lengths, cursor=CURSOR):
    ids = [torch.randint(100, (length,)) for length in lengths]
    masks = [torch.rand(length) < 0.5 for length in lengths]
    return TokenBatch.pack(cursor, range(len(lengths)), ids, masks)


def lease_of(batch):
    channel = LocalChannel(SPEC, max_tokens=64)
    channel.writer.acquire(batch, timeout_s=0)
    channel.writer.publish()
    return channel.reader.acquire(timeout_s=0)


def one_more(batch):
    ids = torch.cat([batch.token_ids, batch.token_ids[-1:]])
    mask = torch.cat([batch.loss_mask, batch.loss_mask[-1:]])
    return TokenBatch.pack(batch.cursor, [0], [ids], [mask])


def another_token(batch):
    ids = batch.token_ids.clone()
    ids[3] += 1
    return replace(batch, token_ids=ids)


@pytest.mark.parametrize(
    "change",
    [
        one_more,
        another_token,
        lambda batch: replace(batch, cursor=Cursor(1, 6, 9)),
        lambda batch: replace(batch, cursor=Cursor(0, 5, 9)),
        lambda batch: tokens(cursor=batch.cursor),
        lambda batch: replace(batch, cu_seqlens=torch.tensor([0, 4, 11], dtype=torch.int32)),
    ],
)
def test_features_of_other_tokens_are_refused_and_both_are_named(change):
    mine = tokens(11)
    theirs = change(mine)
    with pytest.raises(RuntimeError, match="the engine sent features of") as caught:
        check_lease(lease_of(theirs), mine)
    assert str(theirs.cursor) in str(caught.value)
    assert str(mine.cursor) in str(caught.value)


@pytest.mark.parametrize("lengths", [(), (1,), (5, 6), (64,)])
def test_features_of_the_planned_tokens_have_one_row_for_each(lengths):
    mine = tokens(*lengths)
    lease = lease_of(mine)
    check_lease(lease, mine)
    assert lease.features.aux_hidden_states.shape == (sum(lengths), 16)
    assert lease.features.last_hidden_states.shape == (sum(lengths), 8)
