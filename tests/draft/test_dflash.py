"""The whole DFlash loss against the plain oracle, anchors, and decoding."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from colospec.draft import block_attention
from colospec.draft.anchors import build_blocks, sample_anchors
from colospec.draft.dflash.config import BlockObjective, DFlashConfig
from colospec.draft.dflash.layers import block_layers
from colospec.draft.dflash.model import DFlash
from tests.draft.cases import (
    LENGTHS,
    assert_gradients,
    gradients,
    make_batch,
    make_config,
    make_draft,
    make_inputs,
    make_target,
    own_anchors,
)
from tests.draft.dflash_oracle import Oracle


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": BlockObjective.dpace, "dpace_alpha": 0.3},
        {"sliding_layers": [1], "sliding_window": 3, "decay_gamma": None},
        {"sliding_layers": [0, 1], "sliding_window": 6, "num_anchors": 100, "block_size": 7},
        {"num_layers": 1, "block_size": 2, "chunk_tokens": None},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
@pytest.mark.parametrize("scores", [1, 2**22], ids=["one block at a time", "all at once"])
def test_loss_and_all_gradients_equal_the_plain_oracle(settings, scores, generator, monkeypatch):
    monkeypatch.setitem(block_attention.MAX_SCORES, "cpu", scores)
    config, target = make_config("dflash", **settings), make_target(tied=scores == 1)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs(LENGTHS, config, target, generator=generator, density=0.8)

    terms, grads = gradients(draft, batch, seed=3)

    oracle = Oracle(draft, target)
    results = [oracle.document(part, own) for part, own in own_anchors(batch, config, 3)]
    expected = sum(total for total, _, _ in results)
    if expected.requires_grad:
        expected.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.denominator.item() == pytest.approx(sum(part for _, part, _ in results))
    assert_gradients(grads, oracle)
    for slot in range(config.block_size - 1):
        found = [value.item() for value in terms.metrics[f"acc_{slot}"]]
        assert found == [sum(counts[slot][i] for _, _, counts in results) for i in (0, 1)]


def test_anchors_are_supervised_with_supervised_successors_and_at_most_so_many(generator):
    target = make_target()
    batch = make_batch([1, 40, 2, 3, 25], target, generator=generator, density=0.6)
    tokens, mask = batch.tokens, batch.tokens.loss_mask
    borders = tokens.cu_seqlens.tolist()
    possible = [
        [t for t in range(a + 1, b - 1) if mask[t] and mask[t + 1]] for a, b in pairwise(borders)
    ]
    for number in (1, 4, 1000):
        anchors = sample_anchors(tokens, num_anchors=number, generator=generator).tolist()
        assert anchors == sorted(set(anchors))
        for some in possible:
            assert len(set(some) & set(anchors)) == min(number, len(some))
        assert set(anchors) <= {t for some in possible for t in some}


def test_samples_that_fit_a_budget_have_at_most_so_many_blocks(generator):
    """Memory follows blocks: samples short and many have more of them to a token than long ones."""
    most, budget = 12, 96
    lengths = torch.randint(1, budget, (300,), generator=generator).tolist()
    tokens = make_batch(lengths, make_target(), generator=generator, density=0.8).tokens
    borders = tokens.cu_seqlens.tolist()
    supervised = [int(tokens.loss_mask[a:b].sum()) for a, b in pairwise(borders)]

    def sizes_with(**settings):
        config, rows = DFlashConfig(**settings), (np.array(lengths), np.array(supervised))
        return DFlash.sizes(config, *rows, token_budget=budget)

    sizes = sizes_with(num_anchors=5, max_blocks=most)
    assert ((sizes >= lengths) & (sizes <= budget)).all()
    anchors = sample_anchors(tokens, num_anchors=5, generator=generator).numpy()
    blocks = np.histogram(anchors, borders)[0]
    order = np.argsort(sizes)  # the smallest first: as many samples as can be in one micro-batch
    for first in range(len(order)):
        taken = order[first:][sizes[order[first:]].cumsum() <= budget]
        assert blocks[taken].sum() <= most
    wide = sizes_with(num_anchors=5, max_blocks=budget)
    assert wide.tolist() == lengths, "no more than one block to a token"
    alone = sizes_with(num_anchors=50, max_blocks=most)
    assert (alone[np.array(supervised) >= most] == budget).all(), "what has more, shares with none"


def test_all_possible_anchors_are_drawn_equally_often(generator):
    target = make_target()
    tokens = make_batch([12, 7], target, generator=generator, density=2.0).tokens
    counts = torch.zeros(19)
    for _ in range(2000):
        counts[sample_anchors(tokens, num_anchors=2, generator=generator)] += 1
    assert counts[[0, 11, 12, 18]].sum() == 0
    assert (counts[1:11] - 400).abs().max() < 120
    assert (counts[13:18] - 800).abs().max() < 150


def test_anchors_go_on_after_the_generator_is_restored(generator):
    tokens = make_batch([50, 60], make_target(), generator=generator).tokens
    sample_anchors(tokens, num_anchors=5, generator=generator)
    state = generator.get_state()
    first = [sample_anchors(tokens, num_anchors=5, generator=generator) for _ in range(3)]
    generator.set_state(state)
    again = [sample_anchors(tokens, num_anchors=5, generator=generator) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_nothing_is_computed_for_documents_without_anchors_or_behind_the_last_one(generator):
    tokens = make_batch([10, 10], make_target(), generator=generator, density=0.0).tokens
    tokens.loss_mask[13:16] = True
    anchors = sample_anchors(tokens, num_anchors=9, generator=generator)
    blocks = build_blocks(tokens, anchors, block_size=4, mask_token_id=7)
    assert anchors.tolist() == [13, 14]
    assert blocks.context_rows.tolist() == [10, 11, 12, 13]
    assert blocks.lengths == (3, 4)
    assert blocks.slots.tolist() == [1, 2, 5]
    assert blocks.labels.tolist() == tokens.token_ids[[14, 15, 15]].tolist()
    assert len(blocks.input_ids) == 8


@pytest.mark.parametrize("settings", [{}, {"sliding_layers": [0], "sliding_window": 5}])
def test_decoding_gives_the_logits_that_training_compares(settings, generator):
    target = make_target()
    config = make_config("dflash", **settings)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs([17], config, target, generator=generator, density=2.0)
    aux, ids = batch.features.aux_hidden_states, batch.tokens.token_ids
    anchors = torch.tensor([2, 7, 13])
    blocks = build_blocks(batch.tokens, anchors, block_size=4, mask_token_id=target.vocab_size - 1)
    states = draft.norm(draft.unroll(aux, blocks)) @ draft.frozen_head.T
    caches, known = draft.start(), 0
    for expected, anchor in zip(states.view(3, 4, -1), anchors.tolist(), strict=True):
        draft.read(ids[known + 1 : anchor + 1], aux[known:anchor], caches)
        known = anchor
        found = []

        def choose(logits, found=found):
            found.append(logits)
            return logits.argmax(-1)

        begin = ids[anchor : anchor + 1]
        chosen = draft.draft(begin, caches, num_tokens=3, choose=choose)
        torch.testing.assert_close(torch.cat(found), expected[1:], rtol=1e-6, atol=1e-6)
        assert chosen.tolist() == expected[1:].argmax(-1).tolist()
        assert caches[0].length == anchor


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(36, (1, 9, 17, 25, 33)), (64, (1, 16, 31, 46, 61)), (4, (0, 1, 2)), (1, (0,))],
)
def test_default_aux_layers_are_the_published_ones_or_exist_and_differ(num_layers, expected):
    assert block_layers(DFlashConfig(), make_target(num_layers=num_layers)) == expected
