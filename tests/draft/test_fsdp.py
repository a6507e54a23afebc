"""FSDP2 over two real processes against one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from colospec.config import TrainerConfig
from colospec.train.fsdp import shard
from colospec.train.optim import build_optimizer, clip_and_step
from tests.draft.cases import (
    context,
    gradients,
    make_batch,
    make_config,
    make_draft,
    make_inputs,
    make_target,
)
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

    terms, grads = gradients(draft, *batches, num_loss_tokens=NUM_LOSS_TOKENS)
    loss = terms.loss.item()
    assert abs(sum(part for part, _ in results) - loss) < 1e-5 * abs(loss)
    for _, sharded in results:
        assert set(sharded) == set(grads)
        for name, grad in sharded.items():
            bound = 1e-6 * max(1.0, grads[name].abs().max().item())
            torch.testing.assert_close(
                torch.from_numpy(grad), grads[name], rtol=1e-6, atol=bound, msg=name
            )


def make_block_parts(name):
    """A draft of the algorithm `name`, and four batches."""
    generator = torch.Generator().manual_seed(0)
    config, target = make_config(name), make_target()
    draft = make_draft(config, target, generator=generator, dtype=torch.float32)
    batches = [
        make_inputs(lengths, config, target, generator=generator, dtype=torch.float32)
        for lengths in LENGTHS
    ]
    return draft, batches


def train_blocks_sharded(rank, name):
    """Two micro-batches on each rank, then one update; the last one of rank 1 is empty."""
    draft, batches = make_block_parts(name)
    shard(draft, world_size=2, dtype=torch.float32)
    optimizer = build_optimizer(draft, TrainerConfig(lr=0.1))
    denominator = torch.zeros(())
    for last, number in enumerate((rank, 2 + rank)):
        draft.set_requires_gradient_sync(bool(last))
        terms = draft(batches[number], context(seed=number))
        terms.loss.backward()
        denominator += terms.denominator
    dist.all_reduce(denominator)
    norm = clip_and_step(optimizer, 1.0, denominator)
    found = list(draft.named_parameters())
    gradients = {name: p.grad.full_tensor().numpy() for name, p in found}
    return norm.item(), gradients, {name: p.full_tensor().detach().numpy() for name, p in found}


@pytest.mark.parametrize("name", ["dflash", "dspark", "domino", "peagle"])
def test_a_loss_whose_denominator_is_known_last_trains_as_in_one_process(name):
    """Each rank draws its own anchors; the mean is over the slots of all of them."""
    draft, batches = make_block_parts(name)

    results = run_ranks(train_blocks_sharded, 2, name)

    terms = [draft(batch, context(seed=number)) for number, batch in enumerate(batches)]
    (sum(t.loss for t in terms) / sum(t.denominator for t in terms)).backward()
    # Adam divides by the gradient's size: of one that is rounding alone it makes a whole step.
    sizes = {name: parameter.grad.abs() for name, parameter in draft.named_parameters()}
    told = {name: (size >= 1e-4 * size.max()) | (size == 0) for name, size in sizes.items()}
    optimizer = build_optimizer(draft, TrainerConfig(lr=0.1))
    norm = clip_and_step(optimizer, 1.0)
    for found, grads, parameters in results:
        assert abs(found - norm.item()) < 1e-5 * norm.item()
        for key, parameter in draft.named_parameters():
            torch.testing.assert_close(
                torch.from_numpy(grads[key]), parameter.grad,
                rtol=1e-4, atol=1e-6 * parameter.grad.abs().max().item(),
            )  # fmt: skip
            assert told[key].float().mean() > 0.9
            torch.testing.assert_close(
                torch.from_numpy(parameters[key])[told[key]], parameter.detach()[told[key]],
                rtol=1e-4, atol=2e-4,
            )  # fmt: skip
