"""What a rank checks before it works."""

import os
import signal
import subprocess
import time
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


def test_a_node_with_a_directory_of_its_own_says_what_to_set(tmp_path):
    keys = {}
    check_shared(tmp_path / "first", Peer(PLACES[0], keys))
    (tmp_path / "second").mkdir()
    with pytest.raises(RuntimeError, match=r"node 1 does not see .*; set run_dir=PATH"):
        check_shared(tmp_path / "second", Peer(PLACES[2], keys), patience_s=0.2)
