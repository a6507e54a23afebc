"""FSDP2 over two real processes against one process on the whole batch."""

import torch
from torch.distributed.fsdp import fully_shard

from tests.draft.cases import context, gradients, make_batch, make_config, make_draft, make_target
from tests.ranks import run_ranks

LENGTHS = [[9, 3], [1, 14], [7, 5], []]
NUM_LOSS_TOKENS = 25


def make_parts():
    generator = torch.Generator().manual_seed(0)
    target = make_target()
    config = make_config(draft_vocab_size=30, fc_norm=True)
    draft = make_draft(config, target, generator=generator, dtype=torch.float32)
    batches = [
        make_batch(lengths, target, generator=generator, dtype=torch.float32) for lengths in LENGTHS
    ]
    return draft, batches


def train_sharded(rank):
    """Two micro-batches on each rank; the last one of rank 1 is empty."""
    draft, batches = make_parts()
    fully_shard(draft)
    draft.set_force_sum_reduction_for_comms(True)
    draft.set_gradient_divide_factor(1.0)
    loss = 0.0
    for last, batch in enumerate((batches[rank], batches[2 + rank])):
        draft.set_requires_gradient_sync(bool(last))
        terms = draft(batch, context(NUM_LOSS_TOKENS))
        terms.loss.backward()
        loss += terms.loss.item()
    return loss, {name: p.grad.full_tensor().numpy() for name, p in draft.named_parameters()}


def test_sharded_gradients_with_an_empty_micro_batch_equal_one_process():
    draft, batches = make_parts()

    results = run_ranks(train_sharded, 2)

    loss, grads = gradients(draft, *batches, num_loss_tokens=NUM_LOSS_TOKENS)
    assert abs(sum(part for part, _ in results) - loss) < 1e-5 * abs(loss)
    for _, sharded in results:
        assert set(sharded) == set(grads)
        for name, grad in sharded.items():
            bound = 1e-6 * max(1.0, grads[name].abs().max().item())
            torch.testing.assert_close(
                torch.from_numpy(grad), grads[name], rtol=1e-6, atol=bound, msg=name
            )
