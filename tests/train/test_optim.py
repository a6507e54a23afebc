"""Learning-rate shapes, weight decay groups and clipping."""

import itertools
import math

import pytest
import torch
from torch import nn

from colospec.config import Schedule, TrainerConfig
from colospec.train.optim import build_optimizer, clip_gradients, learning_rate

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


def test_clipping_returns_the_norm_before_and_bounds_it_after():
    weights = [nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    before = torch.cat([w.grad.flatten() for w in weights]).norm()
    norm = clip_gradients(weights, 0.25)
    after = torch.cat([w.grad.flatten() for w in weights]).norm()
    assert norm == pytest.approx(before.item(), rel=1e-5)
    assert after == pytest.approx(0.25, rel=1e-4)


def test_clipping_shows_gradients_that_are_not_finite():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, float("nan"), 2.0])
    assert not torch.isfinite(clip_gradients([weight], 1.0))
