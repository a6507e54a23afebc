"""Joining, failing and stopping together, with real torchrun jobs of ranks that load no model."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.torchrun import PROGRAMS, command, free_port, read_until, run, started

RANK = PROGRAMS / "world_rank.py"


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_each_role_gets_a_world_of_its_own(num_ranks):
    code, output, _ = run(command(num_ranks, RANK, "--finish"), 120)
    assert code == 0, output
    assert len(re.findall(r"^joined \d", output, re.M)) == num_ranks


def test_two_agents_on_one_host_make_one_job():
    port = free_port()
    words = [command(2, RANK, "--finish", node=n, num_nodes=2, port=port) for n in (0, 1)]
    with started(words[1]) as second:
        code, output, _ = run(words[0], 90)
        rest, _ = second.communicate(timeout=30)
    assert code == 0, output + rest
    assert second.returncode == 0, rest


def test_a_rank_that_comes_20_seconds_late_is_waited_for():
    code, output, took = run(command(2, RANK, "1:late=20", "--finish"), 90)
    assert code == 0, output
    assert took > 20


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("3:raise", "ValueError: boom in start-up"),
        ("0:raise", "ValueError: boom in start-up"),
        ("1:differ", "another configuration than rank 0"),
        ("2:kill", r"rank 2 \(engine 0 on cpu\) died"),
        ("0:kill", r"rank 0 \(trainer 0 on cpu\) died"),
    ],
)
def test_the_first_error_of_any_rank_ends_all_and_stands_in_the_last_lines(action, says):
    code, output, _ = run(command(4, RANK, action, "--blocked"), 90)
    assert code != 0
    assert re.search(says, "\n".join(output.splitlines()[-45:])), output[-3000:]


def test_ranks_blocked_in_c_end_within_five_seconds_of_a_kill():
    with started(command(2, RANK, "--blocked")) as job:
        output = read_until(job, r"joined 1", 60)
        output += read_until(job, r"joined 0", 60) if "joined 0" not in output else ""
        pid = int(re.search(r"joined 1 pid (\d+)", output)[1])
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        rest, _ = job.communicate(timeout=30)
        took = time.monotonic() - began
    assert job.returncode != 0
    assert took < 5, rest
    assert "rank 1 (engine 0 on cpu) died" in rest


def test_a_rank_without_progress_is_named_when_its_phase_limit_passes():
    code, output, _ = run(command(2, RANK, "1:hang"), 90)
    assert code != 0
    assert "rank 1 (engine 0 on cpu) made no progress in phase train" in output
    assert "limit 4 s" in output


def test_killing_torchrun_ends_its_ranks():
    with started(command(2, RANK, "--blocked")) as job:
        output = read_until(job, r"joined [01]", 60) + read_until(job, r"joined [01]", 60)
        os.kill(job.pid, signal.SIGKILL)
        pids = [int(pid) for pid in re.findall(r"pid (\d+)", output)]
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(alive(pid) for pid in pids)


def test_a_request_to_stop_reaches_every_rank():
    with started(command(4, RANK)) as job:
        output = "".join(read_until(job, r"joined \d", 60) for _ in range(4))
        os.kill(int(re.search(r"joined 3 pid (\d+)", output)[1]), signal.SIGTERM)
        rest, _ = job.communicate(timeout=30)
    assert job.returncode == 0, rest
    assert len(re.findall("saw the request to stop", rest)) == 4


def test_a_stop_before_the_first_step_ends_a_job_that_some_ranks_have_not_joined():
    """They die of the signal while they import, and the others must not wait for them."""
    with started(command(4, RANK, "2:late=60", "3:late=60")) as job:
        output = "".join(read_until(job, r"began \d", 60) for _ in range(2))
        began = time.monotonic()
        job.send_signal(signal.SIGTERM)
        rest, _ = job.communicate(timeout=60)
        took = time.monotonic() - began
    assert job.returncode != 0
    assert took < 8, output + rest
    assert re.search(r"SIGTERM in phase start: .* ranks \[2, 3\] of this node had not", rest), rest
    assert "error: " not in rest


def test_a_stop_before_the_first_step_is_no_failure_that_torchrun_would_mend():
    words = command(2, RANK, "1:late=6")
    at = next(i for i, word in enumerate(words) if word.startswith("--nproc"))
    words.insert(at, "--max-restarts=2")
    with started(words) as job:
        output = read_until(job, r"began 0 pid", 60)
        os.kill(int(re.search(r"began 0 pid (\d+)", output)[1]), signal.SIGTERM)
        rest, _ = job.communicate(timeout=60)
    assert job.returncode == 0, rest
    assert "began 0" not in rest, "it was started again"
    assert "before its first step, with nothing to save" in rest


def two_nodes(*actions):
    port = free_port()
    return [command(2, RANK, *actions, node=n, num_nodes=2, port=port) for n in (0, 1)]


def pid_of(output, word, rank):
    return int(re.search(rf"{word} {rank} pid (\d+)", output)[1])


def test_a_stop_of_one_node_before_the_first_step_is_a_failure_to_the_other():
    """Its scheduler must start it again: the node that was asked may come back."""
    first, second = two_nodes("1:late=60")
    with started(second) as asked, started(first) as other:
        output = "".join(read_until(asked, r"began \d", 60) for _ in range(2))
        read_until(other, r"began 0", 60)
        os.kill(pid_of(output, "began", 2), signal.SIGTERM)
        asked_output, _ = asked.communicate(timeout=60)
        other_output, _ = other.communicate(timeout=60)
    assert asked.returncode == 0, asked_output
    assert other.returncode != 0, other_output
    assert re.search(r"rank 2 .*SIGTERM in phase start", other_output), other_output


def test_a_rank_that_fails_before_it_joins_is_a_failure_on_every_node():
    first, second = two_nodes("1:absent")
    with started(second) as other:
        code, output, _ = run(first, 90)
        rest, _ = other.communicate(timeout=60)
    assert code != 0, output
    assert "failed while it imported" in output
    assert other.returncode != 0, rest


def test_every_rank_knows_whether_its_own_node_was_asked_to_stop():
    first, second = two_nodes()
    with started(second) as asked, started(first) as other:
        output = "".join(read_until(asked, r"joined \d", 60) for _ in range(2))
        os.kill(pid_of(output, "joined", 3), signal.SIGTERM)
        asked_output, _ = asked.communicate(timeout=60)
        other_output, _ = other.communicate(timeout=60)
    assert re.findall(r"foreign (\w+)", asked_output) == ["False"] * 2, asked_output
    assert re.findall(r"foreign (\w+)", other_output) == ["True"] * 2, other_output


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
