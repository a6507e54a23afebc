"""DFlash's variants on a GPU: bfloat16 gradients, and no waiting for the device."""

import pytest
import torch

from colospec.batch import FeatureBatch, Features
from colospec.draft.dspark.config import MarkovHeadType
from tests.draft import test_domino, test_dspark
from tests.draft.cases import make_target
from tests.gpu.machine import needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus(1)]

CASES = {
    "domino": (test_domino, {"gru_hidden_dim": 48, "emb_dim": 32}),
    "domino-unshifted": (test_domino, {"gru_hidden_dim": 48, "emb_dim": 32, "shift_label": False}),
} | {
    kind.value: (test_dspark, {"markov_rank": 32, "markov_head_type": kind})
    for kind in MarkovHeadType
}


def make(name, generator):
    module, settings = CASES[name]
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16, intermediate_size=96)
    config = module.make_config(block_size=8, num_anchors=40, **settings)
    draft = module.make_draft(config, target, generator=generator, dtype=torch.bfloat16, scale=0.1)
    batch = test_dspark.make_inputs(
        [90, 1, 40, 3], target, generator=generator, dtype=torch.bfloat16
    )
    return module, draft, batch


def on_gpu(batch):
    aux, last = (part.cuda() for part in (batch.features.aux_hidden_states,
                                          batch.features.last_hidden_states))  # fmt: skip
    return FeatureBatch(batch.tokens, Features(aux, last))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_close_to_float64_on_the_cpu(name):
    module, draft, batch = make(name, torch.Generator().manual_seed(0))

    terms, grads = module.gradients(draft.cuda(), on_gpu(batch))

    exact, expected = module.gradients(draft.cpu().double(), batch)
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=3e-2)
    assert terms.denominator.item() == pytest.approx(exact.denominator.item(), rel=1e-2)
    for name, grad in grads.items():
        ours, theirs = grad.double().cpu().flatten(), expected[name].flatten()
        if theirs.norm() > 1e-6:
            assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95, name


@pytest.mark.parametrize("name", CASES)
def test_a_step_never_waits_for_the_device(name):
    module, draft, batch = make(name, torch.Generator().manual_seed(0))
    draft, batch = draft.cuda(), on_gpu(batch)
    draft(batch, module.context()).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draft(batch, module.context(1)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
