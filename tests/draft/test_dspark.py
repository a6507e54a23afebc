"""The whole DSpark loss against the plain oracle, its labels, decoding, and confidence."""

import pytest
import torch

from colospec.draft import registry
from colospec.draft.anchors import build_blocks
from colospec.draft.dflash.labels import block_text, share_rows, shift_labels
from colospec.draft.dspark.config import MarkovHeadType
from tests.draft.cases import (
    LENGTHS,
    assert_oracle_agrees,
    context,
    decode_told,
    gradients,
    make_batch,
    make_config,
    make_draft,
    make_inputs,
    make_target,
    own_anchors,
)
from tests.draft.dspark_oracle import Oracle

KINDS = list(MarkovHeadType)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence_head_with_markov": False, "decay_gamma": None, "num_anchors": 100},
        {"enable_confidence_head": False, "ce_weight": 0.7, "block_size": 6},
        {"sliding_layers": [1], "sliding_window": 3, "confidence_weight": 0.3},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_loss_metrics_and_all_gradients_equal_the_plain_oracle(settings, kind, generator):
    config = make_config("dspark", markov_head_type=kind, **settings)
    target = make_target(tied=kind is MarkovHeadType.gated)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs(LENGTHS, config, target, generator=generator, density=0.8)

    terms, grads = gradients(draft, batch, seed=3)

    oracle = Oracle(draft, target)
    results = [oracle.document(part, own) for part, own in own_anchors(batch, config, 3)]
    assert_oracle_agrees(terms, grads, oracle, results)


def test_labels_are_one_further_and_stop_at_the_first_unsupervised_one(generator):
    tokens = make_batch([6, 8], make_target(), generator=generator, density=0.0).tokens
    tokens.loss_mask[[2, 3, 4, 8, 9, 11, 12]] = True
    anchors = torch.tensor([2, 3, 8])
    blocks = build_blocks(tokens, anchors, block_size=4, mask_token_id=7)
    shifted, rows = shift_labels(tokens, anchors, blocks, unbroken=True)
    # Document 2 begins at 6: anchor 8 is followed by 9, and 10 is not supervised.
    assert rows.tolist() == [2, 3, 3, 8]
    assert shifted.slots.tolist() == [0, 1, 4, 8]
    assert shifted.places.tolist() == [0, 1, 0, 0]
    assert shifted.labels.tolist() == tokens.token_ids[[3, 4, 4, 9]].tolist()
    assert shifted.counts == (3, 1, 0, 0)
    text = block_text(tokens, anchors, size=4)
    assert text[shifted.slots].tolist() == tokens.token_ids[[2, 3, 3, 8]].tolist()


def test_slots_of_one_position_are_neighbours_and_share_its_row(generator):
    tokens = make_batch([40, 1, 25], make_target(), generator=generator, density=0.9).tokens
    anchors = torch.arange(0, 60, 2)[torch.randperm(30, generator=generator)[:20]].sort().values
    blocks = build_blocks(tokens, anchors, block_size=5, mask_token_id=7)
    shifted, rows = shift_labels(tokens, anchors, blocks, unbroken=False)
    shared, positions, asked = share_rows(shifted, rows)
    assert positions.tolist() == sorted(set(rows.tolist()))
    assert len(positions) < len(rows)
    assert (asked.diff() >= 0).all()

    def told(blocks, rows):
        facts = (blocks.slots, blocks.labels, blocks.places, rows)
        return sorted(zip(*(fact.tolist() for fact in facts), strict=True))

    assert told(shared, positions[asked]) == told(shifted, rows)


def test_labels_go_on_behind_an_unsupervised_one_where_they_may_be_broken(generator):
    tokens = make_batch([6, 8], make_target(), generator=generator, density=0.0).tokens
    tokens.loss_mask[[8, 9, 11, 12]] = True
    anchors = torch.tensor([8])
    blocks = build_blocks(tokens, anchors, block_size=4, mask_token_id=7)
    shifted, rows = shift_labels(tokens, anchors, blocks, unbroken=False)
    assert rows.tolist() == [8, 10, 11]
    assert shifted.counts == (1, 0, 1, 1)


def test_the_last_token_of_a_document_is_no_label_of_the_next_one(generator):
    tokens = make_batch([5, 5], make_target(), generator=generator, density=2.0).tokens
    anchors = torch.tensor([3])
    blocks = build_blocks(tokens, anchors, block_size=4, mask_token_id=7)
    assert shift_labels(tokens, anchors, blocks, unbroken=True)[1].tolist() == [3]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_decoding_told_the_text_gives_the_logits_that_training_compares(kind, generator):
    config, target = make_config("dspark", markov_head_type=kind), make_target()
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs([17], config, target, generator=generator, density=2.0)
    aux, ids = batch.features.aux_hidden_states, batch.tokens.token_ids
    oracle = Oracle(draft, target)
    for anchor, found in decode_told(draft, ids, aux, (2, 7, 12)):
        expected = [z for z, _ in oracle.logits(oracle.states(ids, aux, anchor), ids[anchor:])]
        torch.testing.assert_close(found, torch.stack(expected[:4]).detach())


def test_a_chosen_token_changes_what_follows_and_nothing_before(generator):
    target = make_target()
    draft = make_draft(make_config("dspark"), target, generator=generator)
    caches = draft.start()
    aux = torch.randn(3, 5 * target.hidden_size, dtype=torch.float64)
    draft.read(torch.tensor([2, 3, 1]), aux, caches)

    def logits(choice):
        found = []

        def choose(row):
            found.append(row)
            return torch.tensor([choice if len(found) == 2 else 5])

        with torch.no_grad():
            draft.draft(torch.tensor([1]), caches, num_tokens=4, choose=choose)
        return found

    one, other = logits(6), logits(9)
    assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True, True, False, True]


def test_a_confidence_that_would_never_learn_is_refused():
    with pytest.raises(ValueError, match=r"draft\.confidence_weight=0\.0 must be above 0"):
        make_config("dspark", confidence_weight=0.0).check()
    make_config("dspark", enable_confidence_head=False).check()


def test_the_confidence_learns_how_often_tokens_are_accepted(generator, random_seed):
    """Text and target disagree here, so that neither all tokens are accepted nor none."""
    torch.manual_seed(random_seed)
    config, target = make_config("dspark", num_anchors=20, ce_weight=1.0), make_target()
    draft = registry.find("dspark").from_config(config, target, token_counts=None)
    draft.set_target(torch.randn(40, 16), torch.randn(40, 16))
    batch = make_inputs([24], config, target, generator=generator, dtype=torch.float32, density=2.0)
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    for step in range(120):
        terms = draft(batch, context(seed=step))
        optimizer.zero_grad()
        (terms.loss / terms.denominator).backward()
        optimizer.step()
    error, weight = terms.metrics["confidence_error"]
    assert error / weight < 0.2
