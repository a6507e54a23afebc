"""Random targets, drafts and packed batches that the draft tests share."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.draft import catalog, registry
from colospec.draft.anchors import sample_anchors
from colospec.draft.base import LossTerms, StepContext
from colospec.target import Target

LENGTHS = [1, 9, 2, 3, 6, 1, 12]
BLOCKS = {"num_layers": 2, "block_size": 4, "num_anchors": 3, "chunk_tokens": 5}


def make_target(*, hidden_size=16, vocab_size=40, num_layers=8, tied=False, **settings):
    values = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 500.0,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    return Target.from_config(Path("/target"), {**values, **settings})


SMALL = {
    "eagle3": {"ttt_length": 4, "draft_vocab_size": None, "chunk_tokens": 5},
    "peagle": {"num_layers": 2, "num_depths": 4, "draft_vocab_size": None, "chunk_tokens": 5},
    "dflash": BLOCKS,
    "dspark": BLOCKS | {"markov_rank": 3},
    "domino": BLOCKS | {"gru_hidden_dim": 6, "emb_dim": 3},
}
"""Settings of small drafts by algorithm; one that is not here is tested with its defaults."""


def make_config(algorithm="eagle3", **settings):
    return catalog.find(algorithm).config(**{**SMALL.get(algorithm, {}), **settings})


def make_draft(config, target, *, generator, dtype=torch.float64, scale=0.3):
    """Build a draft with weights large enough for every part to matter."""
    model, counts = registry.find(config.algorithm), None
    if hasattr(config, "draft_vocab_size"):
        counts = torch.randint(0, 9, (target.vocab_size,), generator=generator)
    draft = model.from_config(config, target, token_counts=counts).to(dtype)
    for name, parameter in draft.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * scale + float("norm" in name)).to(dtype)
    shape = (target.vocab_size, target.hidden_size)
    embedding, head = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    draft.set_target(embedding, None if target.tied else head)
    return draft


def make_inputs(lengths, config, target, **options):
    """A packed batch of what the draft of `config` asks for, and of nothing else."""
    spec = registry.features(config, target)
    batch = make_batch(lengths, target, num_aux=len(spec.aux_layer_ids), **options)
    if spec.last_hidden_states:
        return batch
    return FeatureBatch(batch.tokens, Features(batch.features.aux_hidden_states, None))


def make_batch(lengths, target, *, num_aux=3, generator, dtype=torch.float64, density=0.7):
    """Pack documents of `lengths` with random tokens, masks and features."""
    ids = [torch.randint(0, target.vocab_size, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < density for n in lengths]
    tokens = TokenBatch.pack(Cursor(0, 0, 0), range(len(lengths)), ids, masks)
    size = target.hidden_size

    def states(width):
        return torch.randn(tokens.num_tokens, width, generator=generator, dtype=dtype)

    return FeatureBatch(tokens, Features(states(num_aux * size), states(size)))


def documents(batch):
    """Cut a packed batch into one batch for each document."""
    tokens, features = batch.tokens, batch.features
    borders = tokens.cu_seqlens.tolist()
    for start, end in pairwise(borders):
        part, last = slice(start, end), features.last_hidden_states
        yield FeatureBatch(
            TokenBatch.pack(
                tokens.cursor, (start,), [tokens.token_ids[part]], [tokens.loss_mask[part]]
            ),
            Features(features.aux_hidden_states[part], None if last is None else last[part]),
        )


def own_anchors(batch, config, seed):
    """Each document, with the anchors that are drawn in it."""
    anchors = sample_anchors(
        batch.tokens, num_anchors=config.num_anchors, generator=context(seed=seed).generator
    )
    starts = batch.tokens.cu_seqlens.tolist()
    for part, start in zip(documents(batch), starts, strict=False):
        end = start + part.tokens.num_tokens
        yield part, [a - start for a in anchors.tolist() if start <= a < end]


def context(num_loss_tokens=1, *, seed=0, step=0, total_steps=10):
    generator = torch.Generator().manual_seed(seed)
    return StepContext(
        step=step, total_steps=total_steps, num_loss_tokens=num_loss_tokens, generator=generator
    )


def gradients(draft, *batches, **where):
    """Return the terms of all `batches`, added up, and their gradients by name; `where` is that of
    `context`."""
    draft.zero_grad()
    found = []
    for batch in batches:
        found.append(draft(batch, context(**where)))
        found[-1].loss.backward()
    names = found[0].metrics
    terms = LossTerms(
        sum(terms.loss.detach() for terms in found),
        {n: tuple(sum(t.metrics[n][i] for t in found) for i in (0, 1)) for n in names},
        None if found[0].denominator is None else sum(terms.denominator for terms in found),
    )
    return terms, {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}


def decode_told(draft, ids, aux, anchors):
    """Each anchor, and the logits [n, V] of the tokens drafted behind it, told what the text says;
    aux [T, A * H] of the text `ids` [T]."""
    caches, known, number = draft.start(), 0, draft.num_drafted
    for anchor in anchors:
        draft.read(ids[known + 1 : anchor + 1], aux[known:anchor], caches)
        known, found = anchor, []

        def choose(logits, found=found, anchor=anchor):
            found.append(logits)
            end = anchor + 1 + sum(map(len, found))
            return ids[end - len(logits) : end]

        with torch.no_grad():
            told = draft.draft(ids[anchor : anchor + 1], caches, num_tokens=number, choose=choose)
        assert told.tolist() == ids[anchor + 1 : anchor + 1 + number].tolist()
        assert caches[0].length == anchor
        yield anchor, torch.cat(found)


def assert_gradients(grads, oracle):
    """Compare gradients by name with those of the oracle's weights; none there means zero."""
    for name, weight in oracle.weights.items():
        wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(grads[name], wanted, rtol=1e-6, atol=1e-6, msg=name)


def assert_oracle_agrees(terms, grads, oracle, results):
    """Compare with the oracle's results, for each document its loss sum and its metrics as
    (sum, count) by name; a metric that it does not have is 0 / 0."""
    sums = {}
    for _, found in results:
        for name, (value, count) in found.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + value, old[1] + count)
    expected = sum((total for total, _ in results), torch.zeros(()))
    if expected.requires_grad:
        expected.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.denominator.item() == pytest.approx(sums.get("loss", (0, 0))[1])
    assert_gradients(grads, oracle)
    assert sums.keys() <= terms.metrics.keys()
    for name, pair in terms.metrics.items():
        wanted = sums.get(name, (0.0, 0.0))
        assert [part.item() for part in pair] == pytest.approx(wanted, abs=1e-6), name
