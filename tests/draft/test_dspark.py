"""The whole DSpark loss against the plain oracle, its labels, packing, decoding, and learning."""

import random

import pytest
import torch

from colospec.config import Weights
from colospec.draft import registry
from colospec.draft.anchors import build_blocks, sample_anchors
from colospec.draft.dflash.labels import block_text, shift_labels
from colospec.draft.dspark.config import DSparkConfig, MarkovHeadType
from colospec.draft.dspark.model import DSpark
from tests.draft.cases import documents, make_batch, make_target
from tests.draft.dspark_oracle import Oracle
from tests.draft.test_dflash import LENGTHS, context, gradients

KINDS = list(MarkovHeadType)


def make_config(**settings):
    values = {"num_layers": 2, "block_size": 4, "num_anchors": 3, "chunk_tokens": 5,
              "markov_rank": 3}  # fmt: skip
    return DSparkConfig(**{**values, **settings})


def make_draft(config, target, *, generator, dtype=torch.float64, scale=0.3):
    draft = DSpark.from_config(config, target, token_counts=None).to(dtype)
    for name, parameter in draft.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * scale + float("norm" in name)).to(dtype)
    shape = (target.vocab_size, target.hidden_size)
    embedding, head = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    draft.set_target(embedding, None if target.tied else head)
    return draft


def make_inputs(lengths, target, *, generator, **options):
    return make_batch(lengths, target, num_aux=5, generator=generator, **options)


def own_anchors(batch, config, seed):
    """Each document, with the anchors that are drawn in it."""
    anchors = sample_anchors(
        batch.tokens, num_anchors=config.num_anchors, generator=context(seed).generator
    )
    starts = batch.tokens.cu_seqlens.tolist()
    for part, start in zip(documents(batch), starts, strict=False):
        end = start + part.tokens.num_tokens
        yield part, [a - start for a in anchors.tolist() if start <= a < end]


@pytest.fixture
def random_seed():
    """Draw a new seed; pytest shows it when a test fails."""
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture
def generator(random_seed):
    return torch.Generator().manual_seed(random_seed)


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
    config = make_config(markov_head_type=kind, **settings)
    target = make_target(tied=kind is MarkovHeadType.gated)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs(LENGTHS, target, generator=generator, density=0.8)

    terms, grads = gradients(draft, batch, seed=3)

    oracle, expected, sums = Oracle(draft, target), torch.zeros(()), {}
    for part, own in own_anchors(batch, config, 3):
        total, found = oracle.document(part, own)
        expected = expected + total
        for name, (value, count) in found.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + value, old[1] + count)
    if expected.requires_grad:
        expected.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.denominator.item() == pytest.approx(sums.get("loss", (0, 0))[1])
    for name, weight in oracle.weights.items():
        wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(grads[name], wanted, rtol=1e-6, atol=1e-6, msg=name)
    assert sums.keys() <= terms.metrics.keys()
    for name, pair in terms.metrics.items():
        expected_pair = sums.get(name, (0.0, 0.0))
        assert [part.item() for part in pair] == pytest.approx(expected_pair, abs=1e-6), name


def test_labels_are_one_further_and_stop_at_the_first_unsupervised_one(generator):
    tokens = make_inputs([6, 8], make_target(), generator=generator, density=0.0).tokens
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


def test_labels_go_on_behind_an_unsupervised_one_where_they_may_be_broken(generator):
    tokens = make_inputs([6, 8], make_target(), generator=generator, density=0.0).tokens
    tokens.loss_mask[[8, 9, 11, 12]] = True
    anchors = torch.tensor([8])
    blocks = build_blocks(tokens, anchors, block_size=4, mask_token_id=7)
    shifted, rows = shift_labels(tokens, anchors, blocks, unbroken=False)
    assert rows.tolist() == [8, 10, 11]
    assert shifted.counts == (1, 0, 1, 1)


def test_the_last_token_of_a_document_is_no_label_of_the_next_one(generator):
    tokens = make_inputs([5, 5], make_target(), generator=generator, density=2.0).tokens
    anchors = torch.tensor([3])
    blocks = build_blocks(tokens, anchors, block_size=4, mask_token_id=7)
    assert shift_labels(tokens, anchors, blocks, unbroken=True)[1].tolist() == [3]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("lengths", [[], [1], [12]])
def test_nothing_supervised_gives_zero_gradients_to_every_parameter(lengths, kind, generator):
    config = make_config(markov_head_type=kind)
    draft = make_draft(config, make_target(), generator=generator)
    batch = make_inputs(lengths, make_target(), generator=generator, density=0.0)
    terms, grads = gradients(draft, batch)
    assert (terms.loss.item(), terms.denominator.item()) == (0.0, 0.0)
    assert all(not grad.any() for grad in grads.values())


def test_documents_do_not_see_each_other(generator):
    target = make_target()
    config = make_config(num_anchors=100, markov_head_type=MarkovHeadType.rnn)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs([9, 14, 6], target, generator=generator)
    packed, grads = gradients(draft, batch)
    single = [gradients(draft, part) for part in documents(batch)]
    assert packed.loss.item() == pytest.approx(sum(t.loss.item() for t, _ in single), rel=1e-9)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, sum(g[name] for _, g in single), rtol=1e-8, atol=1e-10)


def test_chunks_give_what_one_pass_gives(generator):
    target = make_target()
    draft = make_draft(make_config(num_anchors=100), target, generator=generator)
    batch = make_inputs([20, 14], target, generator=generator)
    small, grads = gradients(draft, batch)
    draft.config.chunk_tokens = None
    whole, expected = gradients(draft, batch)
    assert small.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_decoding_told_the_text_gives_the_logits_that_training_compares(kind, generator):
    target = make_target()
    config = make_config(markov_head_type=kind)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs([17], target, generator=generator, density=2.0)
    aux, ids = batch.features.aux_hidden_states, batch.tokens.token_ids
    oracle, caches, known = Oracle(draft, target), draft.start(), 0
    for anchor in (2, 7, 12):
        expected = [z for z, _ in oracle.logits(oracle.states(ids, aux, anchor), ids[anchor:])]
        draft.read(ids[known + 1 : anchor + 1], aux[known:anchor], caches)
        known = anchor
        found = []

        def choose(logits, found=found, anchor=anchor):
            found.append(logits)
            return ids[anchor + len(found)][None]

        with torch.no_grad():
            told = draft.draft(ids[anchor : anchor + 1], caches, num_tokens=4, choose=choose)
        torch.testing.assert_close(torch.cat(found), torch.stack(expected[:4]).detach())
        assert told.tolist() == ids[anchor + 1 : anchor + 5].tolist()
        assert caches[0].length == anchor


def test_a_chosen_token_changes_what_follows_and_nothing_before(generator):
    target = make_target()
    draft = make_draft(make_config(), target, generator=generator)
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
        make_config(confidence_weight=0.0).check()
    make_config(enable_confidence_head=False).check()


def test_it_asks_for_the_last_hidden_states():
    spec = registry.features(DSparkConfig(), make_target(num_layers=36))
    assert [tensor.name for tensor in spec.tensors()] == ["aux_hidden_states", "last_hidden_states"]
    assert spec.aux_layer_ids == (1, 9, 17, 25, 33)


def test_bfloat16_training_is_close_to_float64_of_the_same_weights(generator):
    target = make_target(hidden_size=32)
    config = make_config(num_anchors=30)
    draft = make_draft(config, target, generator=generator, dtype=torch.bfloat16, scale=0.1)
    batch = make_inputs([40, 30], target, generator=generator, dtype=torch.bfloat16)
    low, grads = gradients(draft, batch)
    exact, expected = gradients(draft.double(), batch)
    assert low.loss.item() == pytest.approx(exact.loss.item(), rel=3e-2)
    for name, grad in grads.items():
        similar = torch.cosine_similarity(grad.double().flatten(), expected[name].flatten(), dim=0)
        assert similar > 0.95, name


def test_it_learns_to_repeat_one_text(generator):
    torch.manual_seed(0)
    target = make_target(vocab_size=30)
    config = make_config(num_anchors=20, ce_weight=1.0)
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
    error, weight = terms.metrics["confidence_error"]
    assert hits / count > 0.9
    assert error / weight < 0.1
