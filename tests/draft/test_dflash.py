"""The whole DFlash loss against the plain oracle, anchors, packing, decoding, and learning."""

import random
from itertools import pairwise

import pytest
import torch

from colospec.batch import FeatureBatch, Features
from colospec.config import Weights
from colospec.draft import block_attention, registry
from colospec.draft.anchors import build_blocks, sample_anchors
from colospec.draft.base import StepContext
from colospec.draft.dflash.config import BlockObjective, DFlashConfig
from colospec.draft.dflash.layers import block_layers
from colospec.draft.dflash.model import DFlash
from tests.draft.cases import documents, make_batch, make_target
from tests.draft.dflash_oracle import Oracle

LENGTHS = [1, 9, 2, 3, 6, 1, 12]


def make_config(**settings):
    values = {"num_layers": 2, "block_size": 4, "num_anchors": 3, "chunk_tokens": 5}
    return DFlashConfig(**{**values, **settings})


def make_draft(config, target, *, generator, dtype=torch.float64, scale=0.3):
    draft = DFlash.from_config(config, target, token_counts=None).to(dtype)
    for parameter in draft.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * scale + float(parameter.dim() == 1)).to(dtype)
    shape = (target.vocab_size, target.hidden_size)
    embedding, head = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    draft.set_target(embedding, None if target.tied else head)
    return draft


def make_inputs(lengths, target, *, generator, **options):
    batch = make_batch(lengths, target, num_aux=5, generator=generator, **options)
    return FeatureBatch(batch.tokens, Features(batch.features.aux_hidden_states, None))


def parts(batch):
    """One batch for each document, and where it begins."""
    both = FeatureBatch(
        batch.tokens,
        Features(batch.features.aux_hidden_states, batch.features.aux_hidden_states),
    )
    return list(zip(documents(both), batch.tokens.cu_seqlens.tolist(), strict=False))


def context(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return StepContext(step=0, total_steps=1, num_loss_tokens=1, generator=generator)


def gradients(draft, batch, seed=0):
    draft.zero_grad()
    terms = draft(batch, context(seed))
    terms.loss.backward()
    return terms, {name: p.grad.clone() for name, p in draft.named_parameters()}


@pytest.fixture
def random_seed():
    """Draw a new seed; pytest shows it when a test fails."""
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture
def generator(random_seed):
    return torch.Generator().manual_seed(random_seed)


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
    config, target = make_config(**settings), make_target(tied=scores == 1)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs(LENGTHS, target, generator=generator, density=0.8)

    terms, grads = gradients(draft, batch, seed=3)

    anchors = sample_anchors(
        batch.tokens, num_anchors=config.num_anchors, generator=context(3).generator
    )
    oracle, results = Oracle(draft, target), []
    for part, start in parts(batch):
        end = start + part.tokens.num_tokens
        own = [a - start for a in anchors.tolist() if start <= a < end]
        results.append(oracle.document(part, own))
    expected = sum(total for total, _, _ in results)
    if expected.requires_grad:
        expected.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.denominator.item() == pytest.approx(sum(part for _, part, _ in results))
    for name, weight in oracle.weights.items():
        wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(grads[name], wanted, rtol=1e-6, atol=1e-6, msg=name)
    for slot in range(config.block_size - 1):
        found = [value.item() for value in terms.metrics[f"acc_{slot}"]]
        assert found == [sum(counts[slot][i] for _, _, counts in results) for i in (0, 1)]


def test_anchors_are_supervised_with_supervised_successors_and_at_most_so_many(generator):
    target = make_target()
    batch = make_inputs([1, 40, 2, 3, 25], target, generator=generator, density=0.6)
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


def test_all_possible_anchors_are_drawn_equally_often(generator):
    target = make_target()
    tokens = make_inputs([12, 7], target, generator=generator, density=2.0).tokens
    counts = torch.zeros(19)
    for _ in range(2000):
        counts[sample_anchors(tokens, num_anchors=2, generator=generator)] += 1
    assert counts[[0, 11, 12, 18]].sum() == 0
    assert (counts[1:11] - 400).abs().max() < 120
    assert (counts[13:18] - 800).abs().max() < 150


def test_anchors_go_on_after_the_generator_is_restored(generator):
    tokens = make_inputs([50, 60], make_target(), generator=generator).tokens
    sample_anchors(tokens, num_anchors=5, generator=generator)
    state = generator.get_state()
    first = [sample_anchors(tokens, num_anchors=5, generator=generator) for _ in range(3)]
    generator.set_state(state)
    again = [sample_anchors(tokens, num_anchors=5, generator=generator) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_nothing_is_computed_for_documents_without_anchors_or_behind_the_last_one(generator):
    tokens = make_inputs([10, 10], make_target(), generator=generator, density=0.0).tokens
    tokens.loss_mask[13:16] = True
    anchors = sample_anchors(tokens, num_anchors=9, generator=generator)
    blocks = build_blocks(tokens, anchors, block_size=4, mask_token_id=7)
    assert anchors.tolist() == [13, 14]
    assert blocks.context_rows.tolist() == [10, 11, 12, 13]
    assert blocks.lengths == (3, 4)
    assert blocks.slots.tolist() == [1, 2, 5]
    assert blocks.labels.tolist() == tokens.token_ids[[14, 15, 15]].tolist()
    assert len(blocks.input_ids) == 8


@pytest.mark.parametrize("lengths", [[], [1], [1, 2, 1], [12]])
def test_nothing_supervised_gives_zero_gradients_to_every_parameter(lengths, generator):
    draft = make_draft(make_config(), make_target(), generator=generator)
    batch = make_inputs(lengths, make_target(), generator=generator, density=0.0)
    terms, grads = gradients(draft, batch)
    assert (terms.loss.item(), terms.denominator.item()) == (0.0, 0.0)
    assert all(not grad.any() for grad in grads.values())


def test_documents_do_not_see_each_other(generator):
    target = make_target()
    draft = make_draft(make_config(num_anchors=100), target, generator=generator)
    batch = make_inputs([9, 14, 6], target, generator=generator)
    packed, grads = gradients(draft, batch)
    single = [
        gradients(draft, FeatureBatch(p.tokens, Features(p.features.aux_hidden_states, None)))
        for p, _ in parts(batch)
    ]
    assert packed.loss.item() == pytest.approx(sum(t.loss.item() for t, _ in single), rel=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, sum(g[name] for _, g in single), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"sliding_layers": [0], "sliding_window": 5}])
def test_decoding_gives_the_logits_that_training_compares(settings, generator):
    target = make_target()
    config = make_config(**settings)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs([17], target, generator=generator, density=2.0)
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


def test_bfloat16_training_is_close_to_float64_of_the_same_weights(generator):
    target = make_target(hidden_size=32)
    draft = make_draft(make_config(), target, generator=generator, dtype=torch.bfloat16, scale=0.1)
    batch = make_inputs([40, 30], target, generator=generator, dtype=torch.bfloat16)
    low, grads = gradients(draft, batch)
    exact, expected = gradients(draft.double(), batch)
    assert low.loss.item() == pytest.approx(exact.loss.item(), rel=3e-2)
    for name, grad in grads.items():
        similar = torch.cosine_similarity(grad.double().flatten(), expected[name].flatten(), dim=0)
        assert similar > 0.97, name


def test_it_learns_to_repeat_one_text(generator):
    torch.manual_seed(0)
    target = make_target(vocab_size=30)
    config = make_config(num_anchors=20)
    draft = registry.build(config, target, token_counts=None, weights=Weights.random)
    draft.set_target(torch.randn(30, 16), torch.randn(30, 16))
    batch = make_inputs([24], target, generator=generator, dtype=torch.float32, density=2.0)
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    for step in range(120):
        terms = draft(batch, context(step))
        optimizer.zero_grad()
        (terms.loss / terms.denominator).backward()
        optimizer.step()
    hits, count = terms.metrics["acc_0"]
    assert hits / count > 0.9


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(36, (1, 9, 17, 25, 33)), (64, (1, 16, 31, 46, 61)), (4, (0, 1, 2)), (1, (0,))],
)
def test_default_aux_layers_are_the_published_ones_or_exist_and_differ(num_layers, expected):
    assert block_layers(DFlashConfig(), make_target(num_layers=num_layers)) == expected


def test_no_last_hidden_states_are_asked_for():
    spec = registry.features(DFlashConfig(), make_target(num_layers=36))
    assert not spec.last_hidden_states
    assert [tensor.name for tensor in spec.tensors()] == ["aux_hidden_states"]


def test_a_mask_token_outside_the_embedding_is_refused():
    with pytest.raises(ValueError, match=r"mask_token_id=40 .* 40 tokens"):
        DFlash(make_config(mask_token_id=40), make_target())
