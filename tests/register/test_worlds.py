"""What one role does with process groups cannot reach the other."""

import itertools
import random
import re
from pathlib import Path

import pytest

from colospec.config import Mode
from colospec.topology import build
from tests.torchrun import command, run

RANK = Path(__file__).parent / "group_rank.py"


def test_groups_of_one_role_do_not_disturb_the_other():
    seed = random.randrange(10**6)
    code, output, _ = run(command(4, RANK, seed), 90)
    assert code == 0, output
    assert sorted(re.findall(r"^done (\d)", output, re.M)) == ["0", "1", "2", "3"], output


@pytest.mark.parametrize(
    ("nodes", "gpus", "tp"),
    [
        (nodes, gpus, tp)
        for nodes, gpus, tp in itertools.product((1, 2, 3), (1, 2, 4, 6, 8), (1, 2, 4, 8))
        if gpus % tp == 0
    ],
)
def test_no_world_has_two_ranks_on_one_gpu_or_one_rank_twice(nodes, gpus, tp):
    topology = build(
        Mode.colocate,
        world_size=2 * nodes * gpus,
        local_world_size=2 * gpus,
        visible_gpus=gpus,
        tp=tp,
    )
    places = topology.places
    for seat in (lambda p: (p.node, p.gpu), lambda p: p.world_rank, lambda p: p.rank):
        assert len({(p.world_name, seat(p)) for p in places}) == len(places)
    for place in places:
        other = places[place.peer]
        assert (other.node, other.gpu, other.peer) == (place.node, place.gpu, place.rank)
