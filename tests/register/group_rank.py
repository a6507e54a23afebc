"""A rank of a job whose roles make different process groups, in different numbers and orders.

`group_rank.py SEED`: trainers make a few groups, engines many more; each is used at once.
"""

import os
import random
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from colospec import log
from colospec.config import LimitConfig, Mode
from colospec.topology import Role, build
from colospec.train.fsdp import shard
from colospec.world import open_world

NUM_GROUPS = {Role.TRAINER: 2, Role.ENGINE: 10}


def use_random_groups(world):
    """Make groups of random members of this role's world; add up the ranks in each."""
    place = world.place
    rng = random.Random(f"{sys.argv[1]} {place.world_name}")
    for _ in range(NUM_GROUPS[place.role]):
        size = rng.randint(1, place.world_size)
        members = sorted(rng.sample(range(place.world_size), size))
        group = dist.new_group(members, backend="gloo")
        if place.world_rank in members:
            total = torch.tensor(float(place.world_rank))
            dist.all_reduce(total, group=group)
            assert total.item() == sum(members)
        objects = [None] * place.world_size
        dist.all_gather_object(objects, str(place))
        assert all(place.role.value in text for text in objects)


def check_mesh(world):
    """The draft is sharded over the trainers and nothing else."""
    model = nn.Linear(8, 4)
    shard(model, world_size=world.place.role_size, dtype=torch.float32)
    assert isinstance(model.weight, DTensor)
    assert model.weight.device_mesh.size() == dist.get_world_size() == world.place.role_size
    model(torch.ones(2, 8)).sum().backward()


def main():
    topology = build(
        Mode.colocate,
        world_size=int(os.environ["WORLD_SIZE"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        visible_gpus=0,
        tp=2,
    )
    log.to_console()
    limit = LimitConfig(start_s=40, load_s=40, step_s=40)
    with open_world(topology, limit) as world:
        world.join_role()
        use_random_groups(world)
        if world.place.role is Role.TRAINER:
            check_mesh(world)
        sys.stderr.write(f"done {world.place.rank}\n")


if __name__ == "__main__":
    main()
