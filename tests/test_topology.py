"""The table of ranks, for every shape of job, and the errors for impossible ones."""

import itertools

import pytest

from colospec.config import Mode
from colospec.topology import Role, build

NODES = range(1, 5)
GPUS = range(1, 9)
TP = range(1, 9)


SHAPES = [(n, gpus, tp) for n, gpus, tp in itertools.product(NODES, GPUS, TP) if gpus % tp == 0]


def ranks(mode, world_size, local_world_size):
    return build(mode, world_size=world_size, local_world_size=local_world_size, visible_gpus=2)


def colocate(nodes, gpus, tp=1, visible=None, chosen=None):
    return build(
        Mode.colocate,
        world_size=2 * nodes * gpus,
        local_world_size=2 * gpus,
        visible_gpus=gpus if visible is None else visible,
        gpus=chosen,
        tp=tp,
    )


@pytest.mark.parametrize(("nodes", "gpus", "tp"), SHAPES)
def test_colocate_pairs_one_trainer_and_one_engine_on_every_gpu(nodes, gpus, tp):
    places = colocate(nodes, gpus, tp).places
    by_gpu = {}
    for place in places:
        by_gpu.setdefault((place.node, place.gpu), []).append(place)
    assert len(by_gpu) == nodes * gpus
    for trainer, engine in (sorted(pair, key=lambda p: p.rank) for pair in by_gpu.values()):
        assert (trainer.role, engine.role) == (Role.TRAINER, Role.ENGINE)
        assert trainer.role_rank == engine.role_rank
        assert (trainer.peer, engine.peer) == (engine.rank, trainer.rank)


@pytest.mark.parametrize(("nodes", "gpus", "tp"), SHAPES)
def test_every_role_world_counts_its_own_ranks_from_zero(nodes, gpus, tp):
    places = colocate(nodes, gpus, tp).places
    worlds = {}
    for place in places:
        worlds.setdefault(place.world_name, []).append(place)
    assert len(worlds) == 1 + nodes * gpus // tp
    for members in worlds.values():
        assert sorted(p.world_rank for p in members) == list(range(members[0].world_size))
        assert len({p.role for p in members}) == 1
    for name, members in worlds.items():
        if name != "trainer":
            assert len(members) == tp
            assert len({p.node for p in members}) == 1, "a replica stays inside a node"
            assert [p.tp_rank for p in members] == list(range(tp))


@pytest.mark.parametrize(("nodes", "gpus"), list(itertools.product(NODES, GPUS)))
def test_alternate_gives_every_rank_a_gpu_and_no_peer(nodes, gpus):
    topology = build(
        Mode.alternate, world_size=nodes * gpus, local_world_size=gpus, visible_gpus=gpus
    )
    assert topology.num_trainers == nodes * gpus
    assert all(p.peer is None and p.role is Role.TRAINER for p in topology.places)
    assert len({(p.node, p.gpu) for p in topology.places}) == nodes * gpus


def test_ranks_share_the_cpu_where_no_gpu_is_visible():
    places = colocate(1, 4, visible=0).places
    assert {place.device for place in places} == {"cpu"}


def test_idle_gpus_are_one_line_with_the_flag_that_uses_them():
    assert colocate(1, 4, visible=8).notes == ("4 of 8 GPUs idle: --nproc-per-node 16 uses all",)
    assert colocate(1, 4).notes == ()


def test_chosen_gpus_are_used_in_their_order():
    places = colocate(1, 2, visible=8, chosen=[5, 3]).places
    assert [place.gpu for place in places] == [5, 3, 5, 3]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ranks(Mode.colocate, 3, 3), "--nproc-per-node 4"),
        (lambda: ranks(Mode.colocate, 6, 4), "same --nproc-per-node"),
        (lambda: colocate(1, 4, visible=2), "--nproc-per-node 4"),
        (lambda: colocate(1, 6, tp=4), "engine.tp to one of 1, 2, 3, 6"),
        (lambda: colocate(1, 2, tp=4), "engine.tp=4"),
        (lambda: colocate(1, 2, visible=4, chosen=[0, 0]), r"topology.gpus=\[0, 0\]"),
        (lambda: colocate(1, 2, visible=4, chosen=[0, 4]), "GPU 4 does not exist"),
        (lambda: colocate(1, 2, visible=4, chosen=[0]), "--nproc-per-node 2"),
        (lambda: colocate(1, 1, visible=0, chosen=[0]), "no GPU is visible"),
    ],
)  # fmt: skip
def test_impossible_shapes_say_what_to_type(call, says):
    with pytest.raises(ValueError, match=says):
        call()
