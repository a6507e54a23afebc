"""The draft on a GPU: flash attention there, and that a step never waits for the device."""

import pytest
import torch

from colospec.batch import FeatureBatch, Features
from colospec.draft.attention import Documents, ttt_attention
from colospec.draft.settings import Loss
from tests.draft.cases import context, gradients, make_batch, make_config, make_draft, make_target
from tests.draft.test_attention import explicit, make_inputs, run
from tests.gpu.machine import needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus(1)]


def on_gpu(batch, dtype):
    parts = (batch.features.aux_hidden_states, batch.features.last_hidden_states)
    return FeatureBatch(batch.tokens, Features(*(part.to("cuda", dtype) for part in parts)))


@pytest.mark.parametrize("borders", [(0, 1), (0,), (0, 1, 2, 9, 40), (0, 300, 333)], ids=str)
@pytest.mark.parametrize("num_diagonals", [0, 6])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_attention_equals_explicit_attention(borders, num_diagonals, heads):
    query, keys, values = make_inputs(
        borders,
        num_diagonals=num_diagonals,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        dtype=torch.bfloat16,
        seed=0,
    )
    documents = Documents(borders, torch.tensor(borders, dtype=torch.int32, device="cuda"))
    grad = torch.randn_like(query)

    found = run(
        lambda q, k, v: ttt_attention(q, k, v, documents),
        query.cuda(),
        [key.cuda() for key in keys],
        [value.cuda() for value in values],
        grad.cuda(),
    )

    if borders == (0,):
        assert all(tensor.shape[0] == 0 for tensor in found)
        return
    wide = [query.double(), [k.double() for k in keys], [v.double() for v in values]]
    expected = run(lambda q, k, v: explicit(q, k, v, borders), *wide, grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=6e-2, atol=6e-2)


@pytest.mark.parametrize("kind", list(Loss))
@pytest.mark.parametrize("draft_vocab_size", [None, 300])
def test_gradients_are_close_to_float64_on_the_cpu(kind, draft_vocab_size):
    generator = torch.Generator().manual_seed(0)
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16, intermediate_size=96)
    config = make_config(
        loss=kind, draft_vocab_size=draft_vocab_size, chunk_tokens=32, fc_norm=True
    )
    draft = make_draft(config, target, generator=generator, dtype=torch.bfloat16, scale=0.1)
    batch = make_batch([40, 1, 70], target, generator=generator, dtype=torch.bfloat16)
    terms, grads = gradients(draft.cuda(), on_gpu(batch, torch.bfloat16), num_loss_tokens=80)

    exact, expected = gradients(draft.cpu().double(), batch, num_loss_tokens=80)

    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    for name, grad in grads.items():
        wide = grad.double().cpu().flatten()
        assert torch.cosine_similarity(wide, expected[name].flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("kind", list(Loss))
@pytest.mark.parametrize("draft_vocab_size", [None, 300])
def test_a_step_never_waits_for_the_device(kind, draft_vocab_size):
    generator = torch.Generator().manual_seed(1)
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16)
    config = make_config(loss=kind, draft_vocab_size=draft_vocab_size, chunk_tokens=32)
    draft = make_draft(config, target, generator=generator, dtype=torch.bfloat16).cuda()
    batch = on_gpu(make_batch([40, 1, 70], target, generator=generator), torch.bfloat16)
    draft(batch, context(80)).loss.backward()

    torch.cuda.set_sync_debug_mode("error")
    try:
        draft(batch, context(80)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("lengths", "density"), [([], 0.7), ([9, 1, 30], -1.0)], ids=str)
def test_a_batch_without_supervised_positions_gives_zero_gradients(lengths, density):
    generator = torch.Generator().manual_seed(2)
    target = make_target(hidden_size=64, vocab_size=500, head_dim=16)
    draft = make_draft(
        make_config(draft_vocab_size=300), target, generator=generator, dtype=torch.bfloat16
    ).cuda()
    batch = make_batch(lengths, target, generator=generator, density=density)

    terms, grads = gradients(draft, on_gpu(batch, torch.bfloat16), num_loss_tokens=1)

    assert terms.loss.item() == 0
    assert all(grad.abs().max() == 0 for grad in grads.values())


def test_float32_is_refused_with_the_setting():
    states = torch.randn(4, 2, 16, device="cuda")
    documents = Documents((0, 4), torch.tensor([0, 4], dtype=torch.int32, device="cuda"))

    with pytest.raises(ValueError, match=r"trainer.dtype=bfloat16"):
        ttt_attention(states, [states], [states], documents)
