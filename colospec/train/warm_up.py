"""A step before the first one, while the engine still loads its model."""

from __future__ import annotations

import torch

from colospec.batch import Cursor, FeatureBatch, Features, FeatureSpec
from colospec.draft.base import DraftModel, StepContext
from colospec.train.job import Job, Start


def warm_up(draft: DraftModel, job: Job, start: Start, device: torch.device) -> None:
    """Go forward and backward on random features of the sample of the first step that supervises
    most, the same one on every trainer.

    Kernels are compiled and the trainers' communicators made by then. Only gradients stay, for the
    caller to drop: no generator that a run goes on with is used.
    """
    step = next(job.steps(start), None)
    if step is None:
        return
    samples = [sample for part in step.bins for sample in part]
    sample = max(samples, key=job.dataset.num_loss_tokens.__getitem__)
    tokens = job.dataset.batch(Cursor(step.epoch, step.micro_batch, step.step), [sample])
    context = StepContext(
        step=step.step,
        total_steps=job.total_steps,
        num_loss_tokens=step.num_loss_tokens,
        generator=torch.Generator().manual_seed(0),
    )
    features = random_features(job.spec, tokens.num_tokens, device)
    draft(FeatureBatch(tokens, features), context).loss.backward()


def random_features(spec: FeatureSpec, num_tokens: int, device: torch.device) -> Features:
    """Return normal features of T = `num_tokens` tokens as `spec` asks for them."""
    generator = torch.Generator(device).manual_seed(0)
    features = Features.empty(spec, num_tokens, device)
    for tensor in features.tensors():
        tensor.normal_(generator=generator)
    return features
