"""CUDA MPS without a GPU: real processes around a fake control program and a fake CUDA."""

import contextlib
import json
import logging
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from colospec.config import Mode, MpsUse, RunConfig
from colospec.mps import directory, start
from colospec.mps.client import NO_PIPE, Mps, bootstrap, check_users_daemon
from colospec.mps.control import Control
from colospec.mps.errors import MpsError
from colospec.store import JobStore
from colospec.topology import build
from tests.torchrun import PROGRAMS

UUIDS = [f"GPU-{random.getrandbits(32):08x}-{i}" for i in range(4)]
LAUNCH = Path(__file__).parent.parent / "launch"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with the fakes: control program, nvidia-smi, libcuda.so.1."""
    folder = tmp_path_factory.mktemp("bin")
    script(folder / "nvidia-cuda-mps-control",
           f'exec {sys.executable} -I -S {PROGRAMS}/fake_mps_control.py "$@"')  # fmt: skip
    rows = "\n".join(f"{i}, {uuid}, {1000 * (i + 1)}, NVIDIA H200" for i, uuid in enumerate(UUIDS))
    script(folder / "nvidia-smi", f"cat <<'END'\n{rows}\nEND")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", folder / "libcuda.so.1",
         PROGRAMS / "fake_cuda.c"], check=True,
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def machine(programs, monkeypatch):
    """This process on a machine with four GPUs and MPS; its environment is put back."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("CUDA_", "FAKE_"))]:
        del os.environ[name]
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(programs))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def root():
    """A place for daemons' directories; short, for sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="mps-", dir="/tmp"))
    yield path
    for home, record in directory.live(path).items():
        start.stop_keeper(home, record)
    shutil.rmtree(path)


@pytest.fixture
def owner():
    """Starts processes for daemons to live with."""
    with contextlib.ExitStack() as stack:

        def begin():
            process = stack.enter_context(subprocess.Popen(["sleep", "100"]))
            stack.callback(process.kill)
            return process

        yield begin


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def keep(owner, root, **options):
    return start.start_keeper(owner, gpus=",".join(UUIDS), root=root, **options)


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition, limit_s=5.0):
    deadline = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return result


# The keeper and its daemon.


def test_daemon_ends_and_its_directory_goes_with_a_killed_owner(root, owner):
    mine = owner()
    started = keep(mine.pid, root)
    home = started.pipe.parent
    assert home.stat().st_mode & 0o777 == 0o700
    assert len(str(started.pipe / "control")) < 100
    start.probe(started.pipe, UUIDS[0])
    mine.kill()
    wait_for(lambda: not home.exists() and not is_alive(started.daemon))
    assert started.keeper.wait(5) == 0


def test_daemon_ends_with_a_killed_keeper_and_the_next_start_sweeps(root, owner):
    mine = owner()
    dead, alive = keep(mine.pid, root), keep(mine.pid, root)
    dead.keeper.kill()
    wait_for(lambda: not is_alive(dead.daemon))
    assert dead.pipe.exists()
    third = keep(mine.pid, root)
    assert not dead.pipe.parent.exists()
    for living in (alive, third):
        assert is_alive(living.daemon)
        assert Control(living.pipe).servers() == []


def test_two_jobs_have_two_daemons_and_one_ends_alone(root, owner):
    one, two = owner(), owner()
    first, second = keep(one.pid, root), keep(two.pid, root)
    assert first.daemon != second.daemon
    assert set(directory.live(root)) == {first.pipe.parent, second.pipe.parent}
    one.kill()
    wait_for(lambda: not is_alive(first.daemon))
    assert Control(second.pipe).servers() == []


def test_a_restarted_job_stops_the_daemon_of_its_earlier_attempt(root, owner):
    mine, other = owner(), owner()
    earlier, foreign = keep(mine.pid, root), keep(other.pid, root)
    assert start.stop_all_of(mine.pid, root=root) == 1
    assert not is_alive(earlier.daemon)
    assert not earlier.pipe.exists()
    assert is_alive(foreign.daemon)


def test_a_daemon_that_is_slow_to_start_is_waited_for(root, owner, monkeypatch):
    monkeypatch.setenv("FAKE_MPS", "slow")
    assert Control(keep(owner().pid, root).pipe).clients() == set()


@pytest.mark.parametrize(
    ("mode", "words"),
    [("crash", "ended at once with code 1; it wrote: fake: no GPU"), ("mute", "within 1 s")],
)
def test_a_daemon_that_does_not_serve_is_an_error_and_leaves_nothing(
    root, owner, monkeypatch, mode, words
):
    monkeypatch.setenv("FAKE_MPS", mode)
    with pytest.raises(MpsError, match=words):
        keep(owner().pid, root, start_s=1)
    wait_for(lambda: not list(root.iterdir()), limit_s=10)


def test_a_daemon_that_will_not_quit_is_killed(root, owner, monkeypatch):
    monkeypatch.setenv("FAKE_MPS", "stubborn")
    mine = owner()
    started = keep(mine.pid, root)
    mine.kill()
    wait_for(lambda: not is_alive(started.daemon) and not started.pipe.exists(), limit_s=8)


def test_missing_program_says_where_it_comes_from(root, owner, monkeypatch, tmp_path):
    mine = owner()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MpsError, match="comes with the NVIDIA driver"):
        keep(mine.pid, root)


def test_logs_of_a_daemon_that_died_by_itself_stay_until_the_next_start(root, owner):
    mine = owner()
    started = keep(mine.pid, root)
    os.kill(started.daemon, signal.SIGKILL)
    assert started.keeper.wait(10) == 1
    assert mine.poll() is None
    logs = started.pipe.parent / "log"
    assert "ended with code -9 before its owner" in (logs / "keeper.log").read_text()
    keep(mine.pid, root)
    assert not logs.exists()


def test_an_owner_that_is_gone_is_an_error(root, owner):
    gone = owner()
    gone.kill()
    gone.wait()
    with pytest.raises(MpsError, match=f"process {gone.pid}, is gone"):
        keep(gone.pid, root)


def test_keeper_imports_neither_torch_nor_settings():
    code = (
        "import sys, colospec.mps.__main__; sys.exit(bool({'torch', 'hydra'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Ranks.


def settings(use=MpsUse.require):
    run = RunConfig(mode=Mode.colocate)
    run.mps.use = use
    return run


def place(rank=0, visible_gpus=1):
    topology = build(Mode.colocate, world_size=2, local_world_size=2, visible_gpus=visible_gpus)
    return topology.places[rank]


def test_ranks_share_a_daemon_that_dies_with_their_killed_agent(tmp_path):
    os.environ["CUDA_VISIBLE_DEVICES"] = "1,0"
    words = [sys.executable, str(PROGRAMS / "mps_rank.py"), str(tmp_path)]
    agent = subprocess.Popen(
        f"sleep 60 | {shlex.join([*words, '0'])} & sleep 60 | {shlex.join([*words, '1'])} & wait",
        shell=True, start_new_session=True, cwd=PROGRAMS.parent.parent,
        env={**os.environ, "PYTHONPATH": str(PROGRAMS.parent.parent)},
    )  # fmt: skip
    try:
        wait_for(lambda: len(list(tmp_path.glob("?.json"))) == 2, limit_s=30)
        trainer, engine = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
        pipe = Path(trainer["CUDA_MPS_PIPE_DIRECTORY"])
        record = directory.live(directory.ROOT)[pipe.parent]
        assert engine["CUDA_MPS_PIPE_DIRECTORY"] == str(pipe)
        assert Control(pipe).clients() == {trainer["pid"], engine["pid"]}
        for rank in (trainer, engine):
            assert rank["CUDA_VISIBLE_DEVICES"] == f"{UUIDS[1]},{UUIDS[0]}"
            assert rank["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=1000M,1=500M"
            assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in rank
        assert trainer["CUDA_MPS_CLIENT_PRIORITY"] == "0"
        assert engine["CUDA_MPS_CLIENT_PRIORITY"] == "1"
    finally:
        os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
    wait_for(lambda: not pipe.parent.exists() and not is_alive(record.daemon))


def test_nothing_is_touched_where_roles_share_no_gpu():
    os.environ["FAKE_MPS"] = "crash"
    before = dict(os.environ)
    alternate = RunConfig(mode=Mode.alternate)
    for run, where in [
        (settings(), place(visible_gpus=0)),
        (alternate, place()),
    ]:
        assert bootstrap(run, where, JobStore(HashStore()), limit_s=1) is None
    assert os.environ == before


def test_off_keeps_clear_of_other_daemons_too():
    assert bootstrap(settings(MpsUse.off), place(), JobStore(HashStore()), limit_s=1) is None
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == NO_PIPE


def test_require_fails_on_every_rank_with_the_reason_and_what_to_type():
    os.environ["FAKE_MPS"] = "crash"
    store = JobStore(HashStore())
    for rank in (0, 1):
        with pytest.raises(RuntimeError, match=r"no GPU for you.*mps=auto.*\+mode=alternate"):
            bootstrap(settings(), place(rank), store, limit_s=5)


def test_auto_warns_once_and_keeps_clear_of_other_daemons(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("colospec"), "propagate", True)
    os.environ["FAKE_MPS"] = "crash"
    store = JobStore(HashStore())
    for rank in (0, 1):
        assert bootstrap(settings(MpsUse.auto), place(rank), store, limit_s=5) is None
        assert os.environ.pop("CUDA_MPS_PIPE_DIRECTORY") == NO_PIPE
    # A set: where another test has switched propagation off, pytest listens at two loggers.
    (warning,) = {record for record in caplog.records if "time slicing" in record.getMessage()}
    assert warning.levelname == "WARNING"


def test_a_silent_first_rank_is_named():
    with pytest.raises(TimeoutError, match="local rank 0 of node 0 did not say within"):
        bootstrap(settings(), place(1), JobStore(HashStore()), limit_s=0.1)


def test_the_users_daemon_is_used_and_left_alone(root, owner):
    started = keep(owner().pid, root)
    os.environ["CUDA_MPS_PIPE_DIRECTORY"] = str(started.pipe)
    others = set(directory.live(directory.ROOT))
    mps = bootstrap(settings(), place(), JobStore(HashStore()), limit_s=5)
    assert mps == Mps(started.pipe, tuple(UUIDS))
    assert set(directory.live(directory.ROOT)) <= others
    assert is_alive(started.daemon)
    with pytest.raises(MpsError, match=r"runs CUDA without MPS.*has no client"):
        mps.prove_client(os.getpid(), patience_s=0.2)


def test_a_daemon_through_which_cuda_fails_is_an_error(root, owner):
    started = keep(owner().pid, root)
    os.environ["CUDA_MPS_PIPE_DIRECTORY"] = str(started.pipe)
    os.environ["FAKE_CUDA_ERROR"] = "805"
    with pytest.raises(RuntimeError, match=r"cuInit: CUDA error 805 \(MPS client failed"):
        bootstrap(settings(), place(), JobStore(HashStore()), limit_s=5)


def test_a_process_outside_the_daemon_is_caught(root, owner):
    os.environ["CUDA_MPS_PIPE_DIRECTORY"] = "/nonexistent"
    with subprocess.Popen(
        [sys.executable, "-m", "colospec.mps.probe"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with pytest.raises(MpsError, match=f"process {process.pid} runs CUDA without MPS"):
            start.require_client(Control(keep(owner().pid, root).pipe), process.pid, patience_s=0.2)
        process.stdin.close()


def test_users_daemons_that_cannot_serve_are_refused(root, owner, monkeypatch):
    pipe = root / "pipe"
    pipe.mkdir()
    with pytest.raises(MpsError, match="holds no MPS daemon"):
        check_users_daemon(pipe)
    (pipe / "control").touch()
    with pytest.raises(MpsError, match="not a socket"):
        check_users_daemon(pipe)
    dead = keep(owner().pid, root)
    dead.keeper.kill()
    wait_for(lambda: not is_alive(dead.daemon))
    with pytest.raises(MpsError, match="no MPS control daemon answers"):
        check_users_daemon(dead.pipe)
    if os.getuid() == 0:
        os.chown(dead.pipe / "control", 65534, 65534)
        monkeypatch.setattr(os, "getuid", lambda: 1234)
        with pytest.raises(MpsError, match="belongs to user 65534"):
            check_users_daemon(dead.pipe)


# The command line and the local script.


def test_shell_commands_start_list_and_stop_a_daemon(root):
    done = subprocess.run(
        ["bash", "-euc", f"""
            mps="{sys.executable} -m colospec.mps"
            eval "$($mps start --owner $$ --root {root})"
            echo "$CUDA_VISIBLE_DEVICES"
            $mps status --root {root}
            $mps stop --root {root}
            $mps status --root {root}
            $mps stop --root {root}"""],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    devices, listed, empty = done.stdout.splitlines()
    assert devices == ",".join(UUIDS)
    assert str(root) in listed
    assert "clients: none" in listed
    assert "no MPS daemon" in empty
    assert done.returncode == 1
    assert "was not started by" in done.stderr
    assert not list(root.iterdir())


@pytest.mark.parametrize("ending", ["done", "failed", "TERM", "INT", "KILL"])
def test_local_script_leaves_no_daemon_whatever_ends_it(tmp_path, ending):
    job = 'echo "$CUDA_MPS_PIPE_DIRECTORY" > pipe.tmp; mv pipe.tmp pipe; '
    job += {"done": "exit 0", "failed": "exit 7"}.get(ending, "exec sleep 60")
    script(tmp_path / "python", f"""
        case "$*" in *torch.distributed.run*) {job};; esac
        exec {sys.executable} "$@" """)  # fmt: skip
    with subprocess.Popen(
        ["bash", LAUNCH / "local.sh", "--nproc-per-node", "2"],
        cwd=tmp_path, env={**os.environ, "PYTHON": str(tmp_path / "python")},
        start_new_session=True,
    ) as shell:  # fmt: skip
        wait_for((tmp_path / "pipe").exists, limit_s=10)
        pipe = Path((tmp_path / "pipe").read_text().strip())
        if ending in ("TERM", "INT", "KILL"):
            assert Control(pipe).servers() == []
            shell.send_signal(signal.Signals[f"SIG{ending}"])
        code = shell.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert code == {"done": 0, "failed": 7, "TERM": 143, "INT": 130, "KILL": -9}[ending]
    assert pipe.parent.parent == directory.ROOT
    wait_for(lambda: not pipe.parent.exists())
