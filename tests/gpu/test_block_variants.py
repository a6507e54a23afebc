"""Drafters of several tokens at once, on a GPU: bfloat16 gradients, no waiting for the device."""

import pytest
import torch

from colospec.batch import FeatureBatch, Features
from colospec.draft.dspark.config import MarkovHeadType
from tests.draft.cases import (
    context,
    gradients,
    make_batch,
    make_config,
    make_draft,
    make_target,
)
from tests.gpu.machine import needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus(1)]

DOMINO = {"gru_hidden_dim": 48, "emb_dim": 32, "lambda_base_start": 0.5}
CASES = {
    "peagle": ("peagle", {"num_depths": 6, "draft_vocab_size": 300, "keep_ratio": 0.9}),
    "domino": ("domino", DOMINO),
    "domino-unshifted": ("domino", DOMINO | {"shift_label": False}),
} | {
    kind.value: ("dspark", {"markov_rank": 32, "markov_head_type": kind}) for kind in MarkovHeadType
}


def make(name, generator):
    algorithm, settings = CASES[name]
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16, intermediate_size=96)
    blocks = {} if algorithm == "peagle" else {"block_size": 8, "num_anchors": 40}
    config = make_config(algorithm, **blocks, **settings)
    draft = make_draft(config, target, generator=generator, dtype=torch.bfloat16, scale=0.1)
    num_aux = draft.fc.in_features // target.hidden_size
    batch = make_batch(
        [90, 1, 40, 3], target, num_aux=num_aux, generator=generator, dtype=torch.bfloat16
    )
    return draft, batch


def on_gpu(batch):
    aux, last = (part.cuda() for part in (batch.features.aux_hidden_states,
                                          batch.features.last_hidden_states))  # fmt: skip
    return FeatureBatch(batch.tokens, Features(aux, last))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_close_to_float64_on_the_cpu(name):
    draft, batch = make(name, torch.Generator().manual_seed(0))

    terms, grads = gradients(draft.cuda(), on_gpu(batch))

    exact, expected = gradients(draft.cpu().double(), batch)
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=3e-2)
    assert terms.denominator.item() == pytest.approx(exact.denominator.item(), rel=1e-2)
    for name, grad in grads.items():
        ours, theirs = grad.double().cpu().flatten(), expected[name].flatten()
        if theirs.norm() > 1e-6:
            assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95, name


@pytest.mark.parametrize("name", CASES)
def test_a_step_never_waits_for_the_device(name):
    draft, batch = make(name, torch.Generator().manual_seed(0))
    draft, batch = draft.cuda(), on_gpu(batch)
    draft(batch, context()).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draft(batch, context(seed=1)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
