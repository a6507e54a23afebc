"""The step before the first one does what a step does, and leaves nothing but gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colospec.config import (
    DataConfig,
    Mode,
    RunConfig,
    TargetConfig,
    TrainerConfig,
)
from colospec.draft import catalog, registry
from colospec.train.job import Job, Start
from colospec.train.warm_up import random_features, warm_up
from tests import tiny
from tests.draft.cases import make_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root: Path = tmp_path_factory.mktemp("warm-up")
    return RunConfig(
        mode=Mode.colocate,
        target=TargetConfig(path=str(tiny.write_target(root / "target"))),
        data=DataConfig(
            path=str(tiny.write_data(root / "train.jsonl", num_rows=30)),
            cache_dir=str(root / "cache"), max_length=300, token_budget=300, num_workers=1,
        ),
        trainer=TrainerConfig(max_steps=4),
    )  # fmt: skip


# At its first step Domino learns nothing of its correction by default.
SETTINGS = {"domino": {"lambda_base_start": 0.5}}


@pytest.mark.parametrize("name", catalog.algorithms())
def test_all_weights_get_gradients_and_nothing_else_changes(run: RunConfig, name: str) -> None:
    draft_config = make_config(name, **SETTINGS.get(name, {}))
    job = Job.load(replace(run, draft=draft_config), num_trainers=2, progress=False)
    draft = registry.build(job.run.draft, job.target, token_counts=job.token_counts)
    size = job.target.vocab_size, job.target.hidden_size
    draft.set_target(torch.randn(size), torch.randn(size))
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    state = torch.get_rng_state()

    warm_up(draft, job, Start(), CPU)

    assert torch.equal(torch.get_rng_state(), state)
    for key, weight in draft.state_dict().items():
        assert torch.equal(weight, before[key]), key
    for key, parameter in draft.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_a_run_that_has_ended_has_nothing_to_warm_up_for(run: RunConfig) -> None:
    job = Job.load(replace(run, draft=make_config("eagle3")), num_trainers=2, progress=False)
    draft = registry.build(job.run.draft, job.target, token_counts=job.token_counts)
    warm_up(draft, job, Start(0, 0, 4), CPU)
    assert all(parameter.grad is None for parameter in draft.parameters())


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_random_features_are_those_that_the_draft_asks_for(run: RunConfig, name: str) -> None:
    spec = Job.load(replace(run, draft=make_config(name)), num_trainers=2, progress=False).spec
    features = random_features(spec, 7, CPU)
    parts = [features.aux_hidden_states, features.last_hidden_states]
    found = [(part.shape, part.dtype) for part in parts if part is not None]
    assert found == [((7, part.width), part.dtype) for part in spec.tensors()]
