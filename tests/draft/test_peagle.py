"""The whole P-EAGLE loss against the plain oracle, which places are drawn, and decoding."""

from itertools import pairwise

import pytest
import torch

from colospec.draft import block_attention
from colospec.draft.peagle.model import PEagle
from colospec.draft.peagle.sampling import sample_places
from tests.draft.cases import (
    LENGTHS,
    assert_gradients,
    context,
    decode_told,
    documents,
    gradients,
    make_batch,
    make_config,
    make_draft,
    make_target,
)
from tests.draft.peagle_oracle import Oracle


def learners(tokens, config, seed):
    """Pairs (packed place, depth) that learn."""
    learning = sample_places(tokens, config, generator=context(seed=seed).generator).learning
    found, first = [], 0
    for depth, size in enumerate(learning.sizes):
        rows = learning.teacher_rows[learning.slots[first : first + size]] - 1
        found += [(place, depth) for place in rows.tolist()]
        first += size
    return found


@pytest.mark.parametrize("scores", [1, 2**22], ids=["one chain at a time", "all at once"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft_vocab_size": 25, "num_depths": 6, "keep_ratio": 1.0},
        {"num_layers": 1, "keep_ratio": 0.5, "keep_ratio_min": 0.0, "chunk_tokens": None},
        {"num_depths": 1, "num_layers": 3},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_loss_metrics_and_all_gradients_equal_the_plain_oracle(
    settings, scores, generator, monkeypatch
):
    monkeypatch.setitem(block_attention.MAX_SCORES, "cpu", scores)
    config, target = make_config("peagle", **settings), make_target(tied=scores == 1)
    draft = make_draft(config, target, generator=generator)
    batch = make_batch(LENGTHS, target, generator=generator, density=0.8)

    terms, grads = gradients(draft, batch, seed=3)

    pairs = learners(batch.tokens, config, 3)
    oracle, results = Oracle(draft, target), []
    for part, (start, end) in zip(
        documents(batch), pairwise(batch.tokens.cu_seqlens.tolist()), strict=True
    ):
        own = [(place - start, depth) for place, depth in pairs if start <= place < end]
        results.append(oracle.document(part, own))
    expected = sum(total for total, _ in results)
    if expected.requires_grad:
        expected.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.denominator.item() == len(pairs)
    assert_gradients(grads, oracle)
    for depth in range(config.num_depths):
        hits, accepted, count = (sum(s[depth][i] for _, s in results) for i in range(3))
        found = [part.item() for part in terms.metrics[f"acc_{depth}"]]
        assert found == [hits, count]
        found = [part.item() for part in terms.metrics[f"acceptance_rate_{depth}"]]
        assert found == pytest.approx([accepted, count], abs=1e-6)


def test_each_depth_keeps_its_share_of_chains_that_reached_the_one_before(generator):
    target = make_target()
    config = make_config("peagle", num_depths=6, keep_ratio=0.8, keep_ratio_min=0.5)
    batch = make_batch([1, 40, 2, 25, 60], target, generator=generator, density=0.9)
    tokens, mask = batch.tokens, batch.tokens.loss_mask
    pairs = learners(tokens, config, 1)
    drawn = [{place for place, depth in pairs if depth == d} for d in range(6)]
    for start, end in pairwise(tokens.cu_seqlens.tolist()):
        valid = {t for t in range(start, end - 2) if mask[t + 2]}
        assert drawn[0] & set(range(start, end)) == valid
        alive = set(range(start, end))
        for depth in range(1, 6):
            could = {a for a in alive if a + depth in valid}
            share = max(0.8**depth, 0.5)
            wanted = min(len(could), max(0, int((len(valid) - depth) * share)))
            alive = {p - depth for p in drawn[depth] if start <= p < end}
            assert alive <= could
            assert len(alive) == wanted


def test_no_place_is_computed_that_nobody_needs(generator):
    tokens = make_batch([10, 10], make_target(), generator=generator, density=0.0).tokens
    tokens.loss_mask[[13, 15]] = True
    config = make_config("peagle", keep_ratio=1.0, keep_ratio_min=1.0)
    places = sample_places(tokens, config, generator=generator)
    # Tokens 13 and 15 are predicted at places 11 and 13, the first document by none.
    assert places.rows.tolist() == [10, 11, 12, 13]
    assert places.borders.tolist() == [0, 4]
    assert places.learning.teacher_rows.tolist() == [12, 14]
    assert places.learning.sizes[0] == 2
    assert sum(places.learning.sizes) == 2 + sum(
        len(chain.blocks.input_ids) for chain in places.chains
    )


def test_places_go_on_after_the_generator_is_restored(generator):
    tokens = make_batch([50, 60], make_target(), generator=generator).tokens
    config = make_config("peagle")
    state = generator.get_state()
    first = [sample_places(tokens, config, generator=generator) for _ in range(2)]
    generator.set_state(state)
    again = [sample_places(tokens, config, generator=generator) for _ in range(2)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.learning.slots, other.learning.slots)
    assert not torch.equal(first[0].learning.slots, first[1].learning.slots)


@pytest.mark.parametrize("draft_vocab_size", [None, 25])
def test_decoding_gives_the_logits_that_training_compares(draft_vocab_size, generator):
    target = make_target()
    config = make_config("peagle", draft_vocab_size=draft_vocab_size)
    draft = make_draft(config, target, generator=generator)
    batch = make_batch([17], target, generator=generator)
    aux, ids = batch.features.aux_hidden_states, batch.tokens.token_ids
    oracle = Oracle(draft, target)
    for length, logits in decode_told(draft, ids, aux, (3, 7, 12)):
        # Place t reads token t + 1, so the last of `length` states stands at length - 1.
        places = [(a, 0) for a in range(length)] + [(length - 1, d) for d in range(1, 4)]
        expected = torch.stack(oracle.logits(ids, aux, places)[length - 1 :]).detach()
        kept = torch.arange(40) if draft.target_ids is None else draft.target_ids
        torch.testing.assert_close(logits[:, kept], expected, rtol=1e-6, atol=1e-6)
        assert logits.shape == (4, 40)
        assert int(logits.isfinite().sum()) == 4 * len(kept)


def test_a_pruned_vocabulary_needs_counts():
    with pytest.raises(ValueError, match=r"draft_vocab_size=10.*null"):
        PEagle.from_config(
            make_config("peagle", draft_vocab_size=10), make_target(), token_counts=None
        )
