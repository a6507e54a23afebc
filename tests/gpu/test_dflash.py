"""The block drafter on a GPU: bfloat16 gradients, bounded memory, and no waiting for the device."""

import pytest
import torch

from colospec.batch import FeatureBatch, Features
from colospec.draft.dflash.config import BlockObjective
from tests.draft.cases import (
    context,
    gradients,
    make_config,
    make_draft,
    make_inputs,
    make_target,
)
from tests.gpu.machine import needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus(1)]


def on_gpu(batch):
    aux = batch.features.aux_hidden_states.to("cuda", torch.bfloat16)
    return FeatureBatch(batch.tokens, Features(aux, None))


@pytest.mark.parametrize("objective", list(BlockObjective))
@pytest.mark.parametrize("sliding", [{}, {"sliding_layers": [0], "sliding_window": 20}])
def test_gradients_are_close_to_float64_on_the_cpu(objective, sliding):
    generator = torch.Generator().manual_seed(0)
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16, intermediate_size=96)
    config = make_config("dflash", objective=objective, block_size=8, num_anchors=40, **sliding)
    draft = make_draft(config, target, generator=generator, dtype=torch.bfloat16, scale=0.1)
    batch = make_inputs([90, 1, 40, 3], config, target, generator=generator, dtype=torch.bfloat16)

    terms, grads = gradients(draft.cuda(), on_gpu(batch))

    exact, expected = gradients(draft.cpu().double(), batch)
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=3e-2)
    assert terms.denominator.item() == pytest.approx(exact.denominator.item(), rel=1e-2)
    for name, grad in grads.items():
        ours, theirs = grad.double().cpu().flatten(), expected[name].flatten()
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.97, name


def test_a_step_never_waits_for_the_device():
    generator = torch.Generator().manual_seed(0)
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16, intermediate_size=96)
    config = make_config("dflash")
    draft = make_draft(config, target, generator=generator, dtype=torch.bfloat16).cuda()
    batch = on_gpu(make_inputs([60, 40], config, target, generator=generator, dtype=torch.bfloat16))
    draft(batch, context()).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draft(batch, context(seed=1)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
