"""Deaths and stops of real processes, seen by the small peers of peer.py."""

import json
import os
import signal
import time

import pytest

from colospec import _ring
from tests.ring import soak


def test_fifty_kills_at_random_points_are_seen_in_time_and_lose_nothing():
    figures = soak.soak(50)
    assert figures.is_clean, str(figures)
    assert len(figures.detection_s) == 50


def test_status_of_a_death_is_what_the_soak_counts():
    assert soak.DEAD == _ring.DEAD


@pytest.mark.parametrize("fail_after", [0, 1, 100])
def test_failure_text_arrives_after_all_slots_between_processes(fail_after):
    engine, trainer = soak.start_pair(num_slots=2, fail_after=fail_after)
    try:
        report = json.loads(trainer.communicate(timeout=30)[0])
        assert report["text"] == f"failed on purpose after {fail_after}"
        assert (report["count"], report["lost"], report["wrong"]) == (fail_after, 0, 0)
        assert json.loads(engine.communicate(timeout=30)[0])["status"] == _ring.CLOSED
    finally:
        for process in (engine, trainer):
            process.kill()
            process.communicate()


def test_stopped_process_is_not_taken_for_dead_and_goes_on():
    engine, trainer = soak.start_pair()
    try:
        os.kill(engine.pid, signal.SIGSTOP)
        time.sleep(0.3)
        assert trainer.poll() is None
        os.kill(engine.pid, signal.SIGCONT)
        time.sleep(0.1)
        engine.kill()
        report = json.loads(trainer.communicate(timeout=30)[0])
        assert report["status"] == _ring.DEAD
        assert (report["lost"], report["wrong"]) == (0, 0)
    finally:
        for process in (engine, trainer):
            process.kill()
            process.communicate()
