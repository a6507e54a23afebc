"""What a rank checks before it works."""

from dataclasses import dataclass, field

import pytest

from colospec.config import Mode
from colospec.topology import Place, build
from colospec.train.rank import check_shared

PLACES = build(Mode.colocate, world_size=4, local_world_size=2, visible_gpus=0).places


@dataclass
class Peer:
    """A rank of a job whose store is a dict."""

    place: Place
    keys: dict = field(default_factory=dict)

    def from_rank0(self, key, value):
        if self.place.rank == 0:
            self.keys[key] = value
        return self.keys[key]


def test_a_shared_run_directory_is_seen_by_all(tmp_path):
    keys = {}
    for place in PLACES:
        check_shared(tmp_path / "run", Peer(place, keys))


def test_a_node_with_a_directory_of_its_own_says_what_to_set(tmp_path):
    keys = {}
    check_shared(tmp_path / "first", Peer(PLACES[0], keys))
    (tmp_path / "second").mkdir()
    with pytest.raises(RuntimeError, match=r"node 1 does not see .*; set run_dir=PATH"):
        check_shared(tmp_path / "second", Peer(PLACES[2], keys), patience_s=0.2)
