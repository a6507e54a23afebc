"""The trainer's step on a GPU: no wait for the device, true times, steady memory, skipped steps."""

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colospec import topology
from colospec.batch import Features
from colospec.config import DataConfig, Mode, RunConfig, TargetConfig, TrainerConfig
from colospec.draft.eagle3.config import Eagle3Config
from colospec.train.job import Job, Start
from colospec.train.trainer import Trainer
from tests import tiny
from tests.gpu import machine
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, machine.needs_gpus(1)]

BACKEND = "cpu:gloo,cuda:nccl"
WARM_STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Settings of a small bfloat16 job whose micro-batches are of all sizes."""
    root = tmp_path_factory.mktemp("trainer")
    target = tiny.write_target(root / "target", hidden_size=256, num_layers=6, head_dim=64)
    data = tiny.write_data(root / "train.jsonl", num_rows=120)
    return RunConfig(
        mode=Mode.alternate,
        run_dir=str(root / "run"),
        target=TargetConfig(path=str(target)),
        draft=Eagle3Config(ttt_length=3, draft_vocab_size=256),
        data=DataConfig(
            path=str(data),
            cache_dir=str(root / "cache"),
            max_length=300,
            token_budget=600,
            num_workers=1,
        ),
        trainer=TrainerConfig(lr=1e-3, max_steps=10**6, accumulation=2, max_skipped_steps=4),
    )


class Loop:
    """Leases one buffer again and again, as the features of the micro-batch that is next."""

    def __init__(self, job, device):
        torch.manual_seed(time.time_ns() % 2**31)
        self.features = Features.empty(job.spec, job.run.data.token_budget, device)
        for tensor in self.features.tensors():
            tensor.normal_()
        self.batches = (b for step in job.steps(Start()) for b in job.micro_batches(step, 0))

    def acquire(self, *, timeout_s):  # noqa: ARG002
        tokens, full = next(self.batches), self.features
        features = Features(
            full.aux_hidden_states[: tokens.num_tokens],
            full.last_hidden_states[: tokens.num_tokens],
        )
        return Lease(tokens.cursor, tokens.digest, features)


class Lease(SimpleNamespace):
    def __init__(self, cursor, digest, features):
        super().__init__(cursor=cursor, digest=digest, features=features)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def start(run):
    """A trainer that is a world of its own, warm, and the endless steps that it has to make."""
    gpus = torch.cuda.device_count()
    places = topology.build(run.mode, world_size=1, local_world_size=1, visible_gpus=gpus).places
    device = torch.device(places[0].device)
    watchdog = SimpleNamespace(beat=lambda: None)
    world = SimpleNamespace(place=places[0], device=device, limit=run.limit, watchdog=watchdog)
    job = Job.load(run, num_trainers=1, progress=False)
    trainer, loop = Trainer(job, world, Path(run.run_dir)), Loop(job, device)
    steps = job.steps(Start())

    def advance(number):
        for _ in range(number):
            trainer.step(next(steps), loop)

    advance(WARM_STEPS)
    trainer.read_metrics()
    return trainer, loop, advance


def step_without_waiting(_rank, run):
    trainer, _, advance = start(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        advance(12)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return trainer.read_metrics()


def test_a_step_never_waits_for_the_device(run):
    (metrics,) = run_ranks(step_without_waiting, 1, run, backend=BACKEND)
    assert math.isfinite(metrics["loss"])
    assert metrics["skipped"] == 0


def time_steps(_rank, run):
    trainer, _, advance = start(run)
    torch.cuda.synchronize()
    trainer.times.clear()
    began = time.monotonic()
    advance(20)
    torch.cuda.synchronize()
    return time.monotonic() - began, trainer.times.seconds()


def test_the_parts_of_a_step_are_seconds_of_the_device(run):
    ((elapsed, parts),) = run_ranks(time_steps, 1, run, backend=BACKEND)
    assert all(seconds > 0 for seconds in parts.values())
    assert 0.5 * elapsed < sum(parts.values()) < 1.02 * elapsed


def watch_memory(_rank, run):
    trainer, _, advance = start(run)
    seen = []
    for _ in range(20):
        advance(10)
        trainer.read_metrics()
        trainer.times.seconds()
        trainer.times.clear()
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    return seen


def test_memory_is_flat_over_200_steps(run):
    (seen,) = run_ranks(watch_memory, 1, run, backend=BACKEND, timeout_s=120)
    allocated, reserved = zip(*seen, strict=True)
    assert max(allocated[1:]) - min(allocated[1:]) <= 2**20
    assert max(reserved[10:]) - reserved[9] <= 32 * 2**20


def spoil_and_step(_rank, run):
    """Steps with NaN features, between good ones; the weights before and after, and the error."""
    trainer, loop, advance = start(run)

    def weights():
        parameters = trainer.draft.parameters()
        return torch.cat([p.detach().full_tensor().flatten() for p in parameters])

    good = loop.features.aux_hidden_states.clone()
    before = weights()
    loop.features.aux_hidden_states.fill_(math.nan)
    advance(2)
    unchanged = torch.equal(weights(), before)
    loop.features.aux_hidden_states.copy_(good)
    advance(1)
    learns = not torch.equal(weights(), before)
    skipped = trainer.read_metrics()["skipped"]
    loop.features.aux_hidden_states.fill_(math.nan)
    advance(4)
    try:
        trainer.read_metrics()
    except RuntimeError as error:
        return unchanged, learns, skipped, str(error)
    return unchanged, learns, skipped, ""


def test_bad_steps_change_nothing_on_the_device_and_fail_when_they_are_read(run):
    ((unchanged, learns, skipped, error),) = run_ranks(spoil_and_step, 1, run, backend=BACKEND)
    assert unchanged
    assert learns
    assert skipped == pytest.approx(2 / 3)
    assert "gradients were not finite for 4 steps in a row, steps 9 to 12" in error
