"""The whole Domino loss against the plain oracle, its recurrence, schedule, and decoding."""

import random

import pytest
import torch

from colospec.batch import FeatureBatch, Features
from colospec.config import Weights
from colospec.draft import registry
from colospec.draft.base import StepContext
from colospec.draft.domino.config import DominoConfig
from colospec.draft.domino.heads import PrefixGru
from colospec.draft.domino.model import Domino, base_share
from tests.draft.cases import make_target
from tests.draft.domino_oracle import Oracle
from tests.draft.test_dflash import LENGTHS, make_inputs
from tests.draft.test_dspark import own_anchors


def make_config(**settings):
    values = {"num_layers": 2, "block_size": 4, "num_anchors": 3, "chunk_tokens": 5,
              "gru_hidden_dim": 6, "emb_dim": 3}  # fmt: skip
    return DominoConfig(**{**values, **settings})


def make_draft(config, target, *, generator, dtype=torch.float64, scale=0.3):
    draft = Domino.from_config(config, target, token_counts=None).to(dtype)
    for name, parameter in draft.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * scale + float("norm" in name)).to(dtype)
    shape = (target.vocab_size, target.hidden_size)
    embedding, head = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    draft.set_target(embedding, None if target.tied else head)
    return draft


def with_last(batch):
    """The same batch with last hidden states, which nobody reads: for cutting it up."""
    aux = batch.features.aux_hidden_states
    return FeatureBatch(batch.tokens, Features(aux, aux))


def context(seed=0, step=0):
    generator = torch.Generator().manual_seed(seed)
    return StepContext(step=step, total_steps=10, num_loss_tokens=1, generator=generator)


def gradients(draft, batch, **where):
    draft.zero_grad()
    terms = draft(batch, context(**where))
    terms.loss.backward()
    return terms, {name: p.grad.clone() for name, p in draft.named_parameters()}


@pytest.fixture
def random_seed():
    """Draw a new seed; pytest shows it when a test fails."""
    return random.SystemRandom().randrange(1 << 30)


@pytest.fixture
def generator(random_seed):
    return torch.Generator().manual_seed(random_seed)


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
    config, target = make_config(shift_label=shift, **settings), make_target(tied=shift)
    draft = make_draft(config, target, generator=generator)
    batch = make_inputs(LENGTHS, target, generator=generator, density=0.8)

    terms, grads = gradients(draft, batch, seed=3, step=step)

    share = config.lambda_base_start * max(0.0, 1 - step / 5)
    oracle, expected, sums = Oracle(draft, target), torch.zeros(()), {}
    for part, own in own_anchors(with_last(batch), config, 3):
        total, found = oracle.document(part, own, share=share)
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
@pytest.mark.parametrize("lengths", [[], [1], [12]])
def test_nothing_supervised_gives_zero_gradients_to_every_parameter(lengths, shift, generator):
    draft = make_draft(make_config(shift_label=shift), make_target(), generator=generator)
    batch = make_inputs(lengths, make_target(), generator=generator, density=0.0)
    terms, grads = gradients(draft, batch)
    assert (terms.loss.item(), terms.denominator.item()) == (0.0, 0.0)
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("shift", [True, False])
def test_decoding_told_the_text_gives_the_logits_that_training_compares(shift, generator):
    target = make_target()
    draft = make_draft(make_config(shift_label=shift), target, generator=generator)
    batch = make_inputs([17], target, generator=generator, density=2.0)
    aux, ids = batch.features.aux_hidden_states, batch.tokens.token_ids
    oracle, caches, known = Oracle(draft, target), draft.start(), 0
    number = draft.num_drafted
    assert number == (4 if shift else 3)
    for anchor in (2, 7, 12):
        expected = [z for _, z in oracle.pairs(oracle.states(ids, aux, anchor), ids[anchor:])]
        draft.read(ids[known + 1 : anchor + 1], aux[known:anchor], caches)
        known = anchor
        found = []

        def choose(logits, found=found, anchor=anchor):
            found.append(logits)
            return ids[anchor + len(found)][None]

        begin = ids[anchor : anchor + 1]
        with torch.no_grad():
            told = draft.draft(begin, caches, num_tokens=number, choose=choose)
        torch.testing.assert_close(torch.cat(found), torch.stack(expected[:number]).detach())
        assert told.tolist() == ids[anchor + 1 : anchor + 1 + number].tolist()


def test_a_prefix_as_long_as_the_block_is_refused():
    with pytest.raises(ValueError, match="pure_draft_prefix_len=3 leaves none of the 3 drafted"):
        DominoConfig(block_size=4, shift_label=False, pure_draft_prefix_len=3).check()
    DominoConfig(block_size=4, pure_draft_prefix_len=3).check()


def test_no_last_hidden_states_are_asked_for():
    spec = registry.features(DominoConfig(), make_target(num_layers=36))
    assert [tensor.name for tensor in spec.tensors()] == ["aux_hidden_states"]


def test_it_learns_to_repeat_one_text(generator):
    torch.manual_seed(0)
    target = make_target(vocab_size=30)
    config = make_config(num_anchors=20)
    draft = registry.build(config, target, token_counts=None, weights=Weights.random)
    draft.set_target(torch.randn(30, 16), torch.randn(30, 16))
    batch = make_inputs([24], target, generator=generator, dtype=torch.float32, density=2.0)
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    for step in range(120):
        terms = draft(batch, context(seed=step, step=step // 12))
        optimizer.zero_grad()
        (terms.loss / terms.denominator).backward()
        optimizer.step()
    hits, count = terms.metrics["acc_3"]
    assert hits / count > 0.9
