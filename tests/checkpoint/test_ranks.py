"""run_ranks itself: results, failures, deaths and hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def add_up(rank, number):
    total = torch.tensor([rank + number])
    dist.all_reduce(total)
    return rank, total.item(), os.environ.get("COLOSPEC_TEST")


def fail_on_one(rank):
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def die_on_one(rank):
    if rank == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()


def hang_on_one(rank):
    if rank == 1:
        time.sleep(600)


def test_results_come_back_by_rank_with_the_callers_environment(monkeypatch):
    monkeypatch.setenv("COLOSPEC_TEST", "here")
    assert run_ranks(add_up, 2, 10) == [(0, 21, "here"), (1, 21, "here")]


def test_the_first_failing_rank_is_the_tests_failure():
    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*rank one is unwell"):
        run_ranks(fail_on_one, 2)


def test_a_killed_rank_is_reported():
    with pytest.raises(RankError, match=r"rank 1 of 2: died .exit code -9"):
        run_ranks(die_on_one, 2)


def test_a_hanging_rank_is_reported_with_its_stack_and_killed():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2: hung(.|\n)*hang_on_one"):
        run_ranks(hang_on_one, 2, timeout_s=2.0)
    assert time.monotonic() - start < 30
