"""What a rank may take of its GPU, and what it says when that is too little."""

from types import SimpleNamespace

import pytest
import torch

from colospec.config import Mode, RunConfig
from colospec.draft import catalog
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.eagle3.config import Eagle3Config
from colospec.topology import Role
from colospec.train.memory import explain_memory, memory_share


def test_each_role_is_held_to_its_share_of_the_gpu():
    run = RunConfig(mode=Mode.colocate, draft=Eagle3Config())
    run.memory.trainer_fraction, run.memory.engine_fraction = 0.5, 0.3
    assert memory_share(run, Role.TRAINER, ring=0.1) == pytest.approx(0.5)
    assert memory_share(run, Role.ENGINE, ring=0.1) == pytest.approx(0.2), "the ring is not torch's"
    run.mode = Mode.alternate
    assert memory_share(run, Role.TRAINER) == pytest.approx(0.8), "one rank is both roles"


@pytest.mark.parametrize(
    ("draft", "settings"),
    [
        (Eagle3Config(), "lower data.token_budget=8192 ("),
        (DFlashConfig(max_blocks=640), "lower draft.max_blocks=640 or data.token_budget=8192 ("),
    ],
)
def test_out_of_memory_says_which_settings_to_lower(draft, settings):
    run = RunConfig(mode=Mode.colocate, draft=draft)
    world = SimpleNamespace(place="rank 2 (trainer 1 on cuda:1)")
    with pytest.raises(RuntimeError) as caught, explain_memory(run, world):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")
    text = str(caught.value)
    assert settings in text
    assert "rank 2 (trainer 1 on cuda:1)" in text
    assert "memory.trainer_fraction=0.45 (" in text
    assert "tried to allocate 9 GiB" in text


def test_out_of_memory_where_engine_and_trainer_are_one_rank_names_both_shares():
    run = RunConfig(mode=Mode.alternate, draft=Eagle3Config())
    both = r"memory\.trainer_fraction=0\.45 and memory\.engine_fraction=0\.45 "
    with pytest.raises(RuntimeError, match=both), explain_memory(run, SimpleNamespace(place="")):
        raise torch.OutOfMemoryError


def test_every_algorithm_names_settings_that_it_has():
    for name in catalog.algorithms():
        run = RunConfig(mode=Mode.colocate, draft=catalog.find(name).config())
        with (
            pytest.raises(RuntimeError, match="lower "),
            explain_memory(run, SimpleNamespace(place="")),
        ):
            raise torch.OutOfMemoryError
