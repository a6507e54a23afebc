"""A job of two nodes, as two agents on this host."""

import os
import signal
import sys

import pytest

from tests.jobs.start import rank_pid, wait_for
from tests.torchrun import command, free_port, run, started


def nodes(run_dir, *words):
    port = free_port()
    return [
        command(2, "-m", "colospec.run", "+mode=colocate", *words, f"run_dir={run_dir}",
                node=node, num_nodes=2, port=port)
        for node in (0, 1)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_node_that_nobody_asked_to_stop_saves_and_wants_to_go_on(tiny_job, tmp_path):
    """The one that was asked may be evicted and come back; both then go on together."""
    run_dir = tmp_path / "run"
    first, second = nodes(run_dir, *tiny_job, "trainer.max_steps=5000")
    with started(second) as asked, started(first) as other:
        wait_for(run_dir / "metrics.jsonl", '"step": 3,', other)
        os.kill(rank_pid(asked, 3), signal.SIGTERM)
        other_output, _ = other.communicate(timeout=60)
        asked.communicate(timeout=60)
    assert "checkpoint saved; go on with run_dir=" in other_output
    assert other.returncode != 0, other_output
    assert "node 0 ends with code 75, to be started again" in other_output
    assert "exitcode  : 75" in other_output
    (saved,) = (run_dir / "checkpoint").iterdir()
    done = int(saved.name.removeprefix("step-"))
    first, second = nodes(run_dir, *tiny_job, f"trainer.max_steps={done + 2}")
    with started(second) as other:
        code, output, _ = run(first, 120)
        rest, _ = other.communicate(timeout=60)
    assert code == 0, output
    assert other.returncode == 0, rest
    assert f"{done} steps done" in output


def test_restarts_by_torchrun_are_refused_on_several_nodes(tiny_job, tmp_path):
    first, second = nodes(tmp_path / "run", *tiny_job)
    words = [[*line[:3], "--max-restarts=1", *line[3:]] for line in (first, second)]
    with started(words[1]) as other:
        code, output, _ = run(words[0], 90)
        other.communicate(timeout=60)
    assert code != 0
    assert "--max-restarts=1 works on one node" in output
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_rank_whose_first_node_has_gone_says_whom_it_waited_for(tiny_job, tmp_path):
    port = free_port()
    facts = {"RANK": 2, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 1}
    env = {name: str(value) for name, value in facts.items()}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "gone"}
    env["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    words = [sys.executable, "-m", "colospec.run", "+mode=colocate", *tiny_job]
    code, output, _ = run([*words, "limit.start_s=1", f"run_dir={tmp_path}/run"], 90, env=env)
    assert code == 1
    assert f"error: torchrun's store at 127.0.0.1:{port} did not answer" in output
    assert "Traceback" not in output
