"""What a rank checks before it works."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field

import pytest

from colospec.config import Mode, RunConfig
from colospec.draft.eagle3.config import Eagle3Config
from colospec.topology import Place, Role, build
from colospec.train.rank import check_shared, memory_share

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


def test_a_second_job_in_one_run_directory_is_refused(tmp_path):
    held = subprocess.Popen(["flock", tmp_path / ".lock", "sleep", "60"], start_new_session=True)
    try:
        deadline = time.monotonic() + 10
        while not (tmp_path / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        with pytest.raises(RuntimeError, match="another job is using run_dir"):
            check_shared(tmp_path, Peer(PLACES[0]))
    finally:
        os.killpg(held.pid, signal.SIGKILL)
        held.wait(10)


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"run_dir=.*file cannot be made: File exists; choose"):
        check_shared(tmp_path / "file", Peer(PLACES[0]))


def test_each_role_is_held_to_its_share_of_the_gpu():
    run = RunConfig(mode=Mode.colocate, draft=Eagle3Config())
    run.memory.trainer_fraction, run.memory.engine_fraction = 0.5, 0.3
    assert memory_share(run, Role.TRAINER, ring=0.1) == pytest.approx(0.5)
    assert memory_share(run, Role.ENGINE, ring=0.1) == pytest.approx(0.2), "the ring is not torch's"
    run.mode = Mode.alternate
    assert memory_share(run, Role.TRAINER) == pytest.approx(0.8), "one rank is both roles"


def test_a_node_with_a_directory_of_its_own_says_what_to_set(tmp_path):
    keys = {}
    check_shared(tmp_path / "first", Peer(PLACES[0], keys))
    (tmp_path / "second").mkdir()
    with pytest.raises(RuntimeError, match=r"node 1 does not see .*; set run_dir=PATH"):
        check_shared(tmp_path / "second", Peer(PLACES[2], keys), patience_s=0.2)
