"""The draft as training begins with it."""

from __future__ import annotations

from pathlib import Path

from colospec.checkpoint.warm_start import start_from
from colospec.draft import registry
from colospec.draft.base import DraftModel
from colospec.train.frozen import share_frozen
from colospec.train.job import Job
from colospec.world import World


def build_draft(job: Job, world: World) -> DraftModel:
    """Return the draft, whole and alike on all trainers, on this rank's device.

    Fresh weights come from torch's global generator. Raises ValueError for an export format that
    cannot hold this draft (before training, not after it) and for a warm start that does not fit.
    """
    run, place, device = job.run, world.place, world.device
    registry.public_format(run.draft.algorithm, run.export.format).check(run.draft)
    kind = registry.find(run.draft.algorithm)
    draft = kind.from_config(run.draft, job.target, token_counts=job.token_counts)
    draft.to(device)
    draft.set_target(
        *share_frozen(
            job.target,
            run.target.weights,
            device=device,
            rank=place.role_rank,
            world_size=place.role_size,
        )
    )
    if run.trainer.init_from is not None:
        start_from(
            draft,
            Path(run.trainer.init_from),
            job.target,
            vocab=run.trainer.init_vocab,
            token_counts=job.token_counts,
        )
    return draft
