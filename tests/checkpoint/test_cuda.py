"""The same on GPUs: shards leave them by a copy to the host, and come back to any device."""

import pytest
import torch

from colospec.checkpoint.rng import restore_rng
from tests.checkpoint.training import Run, assert_same
from tests.ranks import run_ranks

BACKEND = "cpu:gloo,cuda:nccl"


def open_run(rank, directory, seed, device):
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    return Run(directory, seed=seed, device=device)


def train_and_save(rank, directory, device):
    run = open_run(rank, directory, 5, device)
    for _ in range(3):
        run.step()
    before = run.snapshot()
    run.save(3)
    for _ in range(3):
        run.step()
    run.checkpointer.wait()
    return (
        before,
        run.snapshot(),
        torch.rand(3, generator=run.generator, device=run.device).tolist(),
    )


def resume(rank, directory, device):
    run = open_run(rank, directory, 99, device)
    _, states = run.load(run.checkpointer.choose("auto"))
    loaded = run.snapshot()
    restore_rng(states, run.generator, rank=rank, seed=99, step=3)
    for _ in range(3):
        run.step()
    return (
        loaded,
        run.snapshot(),
        torch.rand(3, generator=run.generator, device=run.device).tolist(),
    )


def check_round_trip(tmp_path, saving, loading, device):
    saved = run_ranks(train_and_save, saving, tmp_path, "cuda", backend=BACKEND)
    resumed = run_ranks(resume, loading, tmp_path, device, backend=BACKEND)
    assert_same(resumed[0][0], saved[0][0])
    if (saving, "cuda") == (loading, device):
        assert_same(resumed[0][1], saved[0][1])
        assert [result[2] for result in resumed] == [result[2] for result in saved]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_state_saved_on_a_gpu_is_resumed_on_it_or_on_a_cpu(tmp_path, device):
    check_round_trip(tmp_path, 1, 1, device)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA GPUs")
@pytest.mark.parametrize(("saving", "loading"), [(2, 2), (2, 1), (1, 2)])
def test_states_are_bit_identical_after_resuming_on_other_gpus(tmp_path, saving, loading):
    check_round_trip(tmp_path, saving, loading, "cuda")
