"""The whole Domino loss against the plain oracle, its recurrence, schedule, and decoding."""

import pytest
import torch

from colospec.draft.domino.config import DominoConfig
from colospec.draft.domino.heads import PrefixGru
from colospec.draft.domino.model import base_share
from tests.draft.cases import (
    LENGTHS,
    assert_oracle_agrees,
    context,
    decode_told,
    gradients,
    make_config,
    make_draft,
    make_inputs,
    make_target,
    own_anchors,
)
from tests.draft.domino_oracle import Oracle


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({}, 0),
        ({}, 3),
        ({"pure_draft_prefix_len": 0, "decay_gamma": None, "num_anchors": 100}, 2),
        ({"lambda_base_start": 0.0, "pure_draft_prefix_len": 2, "block_size": 6}, 0),
        ({"sliding_layers": [1], "sliding_window": 3}, 9),
    ],
)
def test_loss_metrics_and_all_gradients_equal_the_plain_oracle(settings, step, shift, generator):
    config = make_config("domino", shift_label=shift, **settings)
    target = make_target(tied=shift)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs(LENGTHS, config, target, generator=generator, density=0.8)

    terms, grads = gradients(draft, batch, seed=3, step=step)

    share = config.lambda_base_start * max(0.0, 1 - step / 5)
    oracle = Oracle(draft, target)
    results = [
        oracle.document(part, own, share=share) for part, own in own_anchors(batch, config, 3)
    ]
    assert_oracle_agrees(terms, grads, oracle, results)


def test_the_recurrence_is_that_of_torch(generator):
    ours = PrefixGru(5, 7).double()
    theirs = torch.nn.GRU(5, 7, bias=False, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ours(inputs), theirs(inputs)[0])
    state = torch.zeros(3, 7, dtype=torch.float64)
    for place in range(6):
        state = ours.step(inputs[:, place], state)
    torch.testing.assert_close(state, theirs(inputs)[1][0])


def test_the_base_share_falls_to_zero_and_stays_there():
    config = DominoConfig(lambda_base_start=0.8, lambda_base_decay=0.5)
    shares = [base_share(config, context(step=step)) for step in range(10)]
    assert shares[:5] == pytest.approx([0.8, 0.64, 0.48, 0.32, 0.16])
    assert shares[5:] == [0.0] * 5


@pytest.mark.parametrize("shift", [True, False])
def test_decoding_told_the_text_gives_the_logits_that_training_compares(shift, generator):
    config, target = make_config("domino", shift_label=shift), make_target()
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs([17], config, target, generator=generator, density=2.0)
    aux, ids = batch.features.aux_hidden_states, batch.tokens.token_ids
    oracle, number = Oracle(draft, target), 4 if shift else 3
    for anchor, found in decode_told(draft, ids, aux, (2, 7, 12)):
        expected = [z for _, z in oracle.pairs(oracle.states(ids, aux, anchor), ids[anchor:])]
        torch.testing.assert_close(found, torch.stack(expected[:number]).detach())


def test_a_prefix_as_long_as_the_block_is_refused():
    with pytest.raises(ValueError, match="pure_draft_prefix_len=3 leaves none of the 3 drafted"):
        DominoConfig(block_size=4, shift_label=False, pure_draft_prefix_len=3).check()
    DominoConfig(block_size=4, pure_draft_prefix_len=3).check()
