"""Held-out loss and accuracy: the training forward pass without gradients, over all trainers.

The held-out micro-batches are captured by the engines and come through the ring like any other.
Training's random state is not touched: an algorithm that samples gets a generator of its own,
seeded by the micro-batch's number, so that all evaluations of a run, on any number of trainers,
look at the same places.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from colospec.batch import FeatureBatch, FeatureSource, TokenBatch
from colospec.draft.base import DraftModel, StepContext
from colospec.evaluate.simulate import simulated_acceptance_length
from colospec.metrics import Sums
from colospec.train.job import Evaluation, Job
from colospec.train.produce import check_lease
from colospec.train.stop import StopRequestedError, StopVote
from colospec.world import World


def evaluate(
    job: Job, world: World, draft: DraftModel, evaluation: Evaluation, source: FeatureSource
) -> dict[str, float]:
    """Return the means over the held-out samples, by the metrics' names (all trainers together).

    `simulated_acceptance_length` is added. Waits for the device. Raises StopRequestedError, on all
    trainers, where somebody asks to stop before all has been looked at.
    """
    sums, stop = Sums(), StopVote(world.stop_requested)
    for tokens in job.micro_batches(evaluation, world.place.role_rank):
        if stop.wait_any():
            reshard(draft)
            raise StopRequestedError
        stop = StopVote(world.stop_requested)
        lease = source.acquire(timeout_s=world.limit.step_s)
        if lease is None:
            raise RuntimeError(f"the engine ended before the evaluation at {tokens.cursor}")
        with lease, torch.no_grad():
            check_lease(lease, tokens)
            batch = FeatureBatch(tokens, lease.features.to(world.device))
            sums.add(draft(batch, held_out_context(job, evaluation, tokens)).metrics)
        world.watchdog.beat()
    stop.wait_any()
    reshard(draft)
    values = sums.fetch(reduce=dist.all_reduce)
    return values | {"simulated_acceptance_length": simulated_acceptance_length(accuracies(values))}


def held_out_context(job: Job, evaluation: Evaluation, tokens: TokenBatch) -> StepContext:
    """Return the context of a forward pass that only measures."""
    key = f"held out/{job.run.seed}/{tokens.cursor.micro_batch}"
    digest = hashlib.sha256(key.encode()).digest()
    return StepContext(
        step=evaluation.step,
        total_steps=job.total_steps,
        num_loss_tokens=evaluation.num_loss_tokens,
        generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1),
    )


def accuracies(values: dict[str, float]) -> list[float]:
    """Return the accuracy of each drafted token, `acc_0`, `acc_1`, ..."""
    number = sum(name.startswith("acc_") for name in values)
    return [values[f"acc_{place}"] for place in range(number)]


def reshard(draft: DraftModel) -> None:
    """Free the gathered parameters, which only a backward pass would free."""
    assert isinstance(draft, FSDPModule)
    draft.reshard()
