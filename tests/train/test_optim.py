"""Learning-rate shapes, weight decay groups and clipping."""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from colospec.config import Schedule, TrainerConfig
from colospec.train.fsdp import shard
from colospec.train.optim import (
    MAX_UNREAD,
    NormLog,
    build_optimizer,
    clip_and_step,
    gradient_norm,
    learning_rate,
)
from tests.ranks import run_ranks

TOTAL = 1000


def rates(schedule, **settings):
    config = TrainerConfig(lr=1e-3, min_lr=1e-5, schedule=schedule, warmup_fraction=0.1, **settings)
    return [learning_rate(step, TOTAL, config) for step in range(TOTAL + 50)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_every_schedule_warms_up_in_a_line_to_its_peak_and_never_rises_after(schedule):
    values = rates(schedule)
    assert values[0] == pytest.approx(1e-5)
    assert values[49] == pytest.approx(5e-4)
    assert max(values) == pytest.approx(1e-3)
    after = values[100:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


def test_schedules_end_where_they_should():
    assert rates(Schedule.cosine)[TOTAL] == pytest.approx(1e-5)
    assert rates(Schedule.cosine)[550] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates(Schedule.linear)[550] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates(Schedule.linear)[TOTAL + 49] == pytest.approx(1e-5)
    assert rates(Schedule.constant)[TOTAL + 49] == 1e-3
    wsd = rates(Schedule.wsd, decay_fraction=0.2)
    assert wsd[800] == pytest.approx(1e-3)
    assert wsd[900] == pytest.approx((1e-3 + 1e-5) / 2)
    assert wsd[TOTAL] == pytest.approx(1e-5)


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("total", [1, 2, 7])
def test_short_runs_have_finite_rates(schedule, total):
    config = TrainerConfig(schedule=schedule, decay_fraction=0.0, warmup_fraction=1.0)
    assert all(math.isfinite(learning_rate(s, total, config)) for s in range(total + 3))


def test_weight_decay_leaves_norms_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    optimizer = build_optimizer(model, TrainerConfig(weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay[id(model[0].weight)] == 0.1
    assert decay[id(model[1].weight)] == 0.0
    assert len(decay) == 3


def random_model():
    model = nn.Sequential(nn.Linear(7, 5), nn.RMSNorm(5), nn.Linear(5, 3))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 4
    return model


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("max_norm", [0.25, 1e6])
def test_a_step_is_that_of_adamw_on_clipped_gradients(max_norm):
    config = TrainerConfig(weight_decay=0.1, lr=0.01)
    ours, theirs = random_model(), random_model()
    theirs.load_state_dict(ours.state_dict())
    optimizer, plain = build_optimizer(ours, config), build_optimizer(theirs, config)
    for _ in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        before = gradients(ours).norm()
        norm = clip_and_step(optimizer, max_norm)
        nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        plain.step()
        assert norm == pytest.approx(before.item(), rel=1e-5)
        torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(bad):
    model = random_model()
    optimizer = build_optimizer(model, TrainerConfig(weight_decay=0.1))
    assert math.isfinite(clip_and_step(optimizer, 1.0))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[0].weight.grad[2, 3] = bad
    assert not math.isfinite(clip_and_step(optimizer, 1.0))
    assert torch.equal(weights(model), before)
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state["state"][index][name]), name


def shard_and_step(rank, seed):
    """Step a sharded model and a whole one alike; one of the steps has a NaN on rank 1 alone."""
    config = TrainerConfig(weight_decay=0.1, lr=0.01)
    torch.manual_seed(seed)
    whole, inputs = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), torch.randn(4, 6)
    sharded = copy.deepcopy(whole)
    shard(sharded, world_size=2, dtype=torch.float32)
    plain, optimizer = build_optimizer(whole, config), build_optimizer(sharded, config)
    steps = []
    for step in range(4):
        (whole(inputs) * 2).square().sum().backward()
        sharded(inputs).square().sum().mul(2).backward()  # summed over both ranks
        if step == 2:
            for model in (whole, sharded):
                spoil(model, rank)
        expected = clip_and_step(plain, 0.5)
        norm = clip_and_step(optimizer, 0.5)
        torch.testing.assert_close(norm, expected, equal_nan=True)
        plain.zero_grad()
        optimizer.zero_grad()
        steps.append(int(next(iter(optimizer.state.values()))["step"]))
    for mine, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs.data, atol=1e-6, rtol=1e-5)
    return steps


def spoil(model, rank):
    grad = model[1].weight.grad
    if not isinstance(grad, DTensor):
        grad[-1] = math.nan
    elif rank == 1:
        grad.to_local()[-1] = math.nan


def test_shards_step_like_the_whole_and_skip_together():
    assert run_ranks(shard_and_step, 2, random.randrange(2**31)) == [[1, 2, 2, 3]] * 2


def test_the_norm_of_no_gradients_is_zero():
    assert gradient_norm([nn.Parameter(torch.ones(2))]) == 0


def norms(values, limit=3):
    log = NormLog(limit)
    for step, value in enumerate(values):
        log.add(step, torch.tensor(float(value)))
    return log


def test_norms_are_averaged_over_the_window_and_the_skipped_are_counted():
    log = norms([1, 3])
    assert log.read() == {"grad_norm": 2.0, "skipped": 0.0}
    assert log.read() == {}
    log.add(2, torch.tensor(5.0))
    log.add(3, torch.tensor(math.inf))
    assert log.read() == {"grad_norm": math.inf, "skipped": 0.5}


def test_bad_steps_in_a_row_are_counted_across_windows():
    log = norms([1, math.nan, math.inf])
    log.read()
    log.add(3, torch.tensor(math.nan))
    with pytest.raises(RuntimeError, match=r"3 steps in a row, steps 1 to 3; lower trainer\.lr"):
        log.read()


def test_bad_steps_that_are_not_in_a_row_are_no_error():
    assert norms([math.nan, math.inf, 1] * 5).read()["skipped"] == pytest.approx(2 / 3)


def test_norms_do_not_pile_up_on_the_device():
    with pytest.raises(RuntimeError, match="steps 0 to 2"):
        norms([math.nan] * MAX_UNREAD)


def test_a_denominator_divides_the_gradients_before_they_are_clipped():
    torch.manual_seed(random.randrange(2**31))
    plain = nn.Linear(5, 3)
    divided = copy.deepcopy(plain)
    optimizers = [build_optimizer(model, TrainerConfig()) for model in (plain, divided)]
    for max_norm in (0.01, 1e6):
        grads = [torch.randn_like(p) for p in plain.parameters()]
        for p, q, grad in zip(plain.parameters(), divided.parameters(), grads, strict=True):
            p.grad, q.grad = grad.clone(), grad * 7.5
        expected = clip_and_step(optimizers[0], max_norm)
        norm = clip_and_step(optimizers[1], max_norm, torch.tensor(7.5))
        torch.testing.assert_close(norm, expected)
    for p, q in zip(plain.parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_step_without_a_supervised_token_has_a_finite_norm():
    model = nn.Linear(2, 2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert clip_and_step(build_optimizer(model, TrainerConfig()), 1.0, torch.tensor(0.0)) == 0
