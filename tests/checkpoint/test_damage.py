"""Faults: whatever breaks, the newest whole checkpoint is found, and what is wrong gets named."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from colospec import durable
from colospec.checkpoint import dcp, state
from colospec.checkpoint.dcp import Checkpointer
from colospec.checkpoint.manifest import Manifest, latest
from tests.checkpoint.training import Run, assert_same
from tests.ranks import RankError, run_ranks


def save_steps(_rank, directory, steps, width=13):
    run = Run(directory, width=width)
    snapshots = []
    for step in steps:
        run.step()
        run.save(step, epoch=step)
        snapshots.append(run.snapshot())
    run.checkpointer.wait()
    return snapshots


def resume_auto(_rank, directory):
    run = Run(directory, seed=3)
    meta, _ = run.load(run.checkpointer.choose("auto"))
    return meta["epoch"], run.snapshot()


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def remove(path):
    path.unlink()


def garble(path):
    path.write_text(path.read_text()[:40])


def edit(path):
    path.write_text(path.read_text().replace('"epoch": 2', '"epoch": 3'))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, run_ranks(save_steps, 2, directory, [1, 2])[0]


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("__1_0_0.distcp", truncate, "the manifest says"),
        ("__0_0_0.distcp", flip_a_bit, "wrong sha256"),
        (".metadata", flip_a_bit, "wrong sha256"),
        ("__1_0_0.distcp", remove, "missing"),
        (".metadata", remove, "missing"),
        ("manifest.json", garble, "garbled"),
        ("manifest.json", edit, "its sha256 is wrong"),
        ("manifest.json", remove, "No such file"),
    ],
)
def test_the_previous_checkpoint_is_used_and_the_damaged_file_named(
    tmp_path, caplog, two_steps, name, damage, complaint
):
    directory = tmp_path / "checkpoint"
    shutil.copytree(two_steps[0], directory)
    damage(directory / "step-000002" / name)

    assert latest(directory).step == 1

    (warning,) = caplog.messages
    assert f"step-000002/{name}" in warning
    assert complaint in warning


def test_all_ranks_resume_from_the_same_previous_checkpoint(two_steps, tmp_path):
    directory = tmp_path / "checkpoint"
    shutil.copytree(two_steps[0], directory)
    flip_a_bit(directory / "step-000002" / "__1_0_0.distcp")
    for epoch, snapshot in run_ranks(resume_auto, 2, directory):
        assert epoch == 1
        assert_same(snapshot, two_steps[1][0])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(two_steps, tmp_path):
    directory = tmp_path / "checkpoint"
    shutil.copytree(two_steps[0], directory)
    for path in directory.iterdir():
        truncate(path / ".metadata")
    with pytest.raises(RankError, match=r"every checkpoint in .* is damaged \(2;"):
        run_ranks(resume_auto, 2, directory)


def test_naming_a_damaged_checkpoint_is_an_error(two_steps, tmp_path):
    directory = tmp_path / "checkpoint"
    shutil.copytree(two_steps[0], directory)
    path = directory / "step-000002"
    flip_a_bit(path / "__0_0_0.distcp")
    checkpointer = lone(directory)
    with pytest.raises(ValueError, match=r"resume=\S+ is not a whole checkpoint.*__0_0_0.distcp"):
        checkpointer.choose(str(path))
    with pytest.raises(ValueError, match=r"manifest.json: No such file"):
        checkpointer.choose(str(directory))


def test_a_manifest_of_another_format_is_not_read(two_steps, tmp_path, monkeypatch):
    directory = tmp_path / "checkpoint"
    shutil.copytree(two_steps[0], directory)
    manifest = Manifest.read(directory / "step-000002")
    monkeypatch.setattr("colospec.checkpoint.manifest.FORMAT", 2)
    manifest.write(directory / "step-000002")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 2, this version of colospec reads 1"):
        lone(directory).choose(str(directory / "step-000002"))


def die_before_the_commit(_rank, directory):
    run = Run(directory)
    dcp.Manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    run.save(3, epoch=3)
    run.checkpointer.wait()


def test_a_kill_between_writing_and_commit_leaves_the_previous_one(tmp_path, caplog):
    (snapshots, _) = run_ranks(save_steps, 2, tmp_path, [1, 2])
    with pytest.raises(RankError, match=r"exit code -9|was not written"):
        run_ranks(die_before_the_commit, 2, tmp_path)
    assert (tmp_path / "step-000003.tmp" / ".metadata").is_file()

    (epoch, snapshot), _ = run_ranks(resume_auto, 2, tmp_path)

    assert epoch == 2
    assert_same(snapshot, snapshots[1])
    assert caplog.messages == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def die_between_the_renames(_rank, final):
    temporary = final.with_suffix(".tmp")
    temporary.mkdir()
    durable._exchange = lambda *_: False  # a file system that cannot
    final.with_suffix(".old.tmp").mkdir()  # of an earlier death
    rename = Path.rename

    def rename_once(self, target):
        rename(self, target)
        os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = rename_once
    durable.publish(temporary, final)


def test_a_kill_between_two_renames_leaves_the_replaced_one(two_steps, tmp_path):
    directory = tmp_path / "checkpoint"
    shutil.copytree(two_steps[0], directory)
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(die_between_the_renames, 1, directory / "step-000002")
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["step-000001", "step-000002.old.tmp", "step-000002.tmp"]

    assert lone(directory).latest().step == 2

    assert sorted(path.name for path in directory.iterdir()) == ["step-000001", "step-000002"]


def test_publish_replaces_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    for name in ("out", "out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    durable.publish(tmp_path / "out.tmp", tmp_path / "out")

    assert (tmp_path / "out" / "file").read_text() == "out.tmp"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def save_until_killed(_rank, directory, first, delay_s):
    run = Run(directory, keep=1, width=200_000)
    signal.setitimer(signal.ITIMER_REAL, delay_s)  # SIGALRM ends the process where it stands
    for step in range(first, first + 1000):
        run.step()
        run.save(step, epoch=step)


def test_kills_at_random_moments_never_lose_a_committed_checkpoint(tmp_path, caplog):
    run_ranks(save_steps, 1, tmp_path, [1], 200_000)
    newest = 1
    for _ in range(3):
        with contextlib.suppress(RankError):
            run_ranks(save_until_killed, 1, tmp_path, newest + 1, random.uniform(0.1, 0.5))
        found = latest(tmp_path)
        assert found.step >= newest
        newest = found.step
    assert caplog.messages == []


def fill_the_disk_on_one(rank, directory, file_bytes):
    state.FILE_BYTES = file_bytes
    run = Run(directory, width=40_000)
    run.save(1, epoch=1)
    run.checkpointer.wait()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    run.save(2, epoch=2)
    run.step()
    with pytest.raises(RuntimeError, match="step-000002 was not written") as caught:
        run.save(3, epoch=3)
    left = sorted(path.name for path in directory.iterdir())
    dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.save(4, epoch=4)
    run.checkpointer.wait()
    return str(caught.value), left, latest(directory).step


@pytest.mark.parametrize("file_bytes", [2**28, 100_000])
def test_a_full_disk_on_one_rank_is_reported_by_all_and_leaves_the_previous_one(
    tmp_path, file_bytes
):
    results = run_ranks(fill_the_disk_on_one, 2, tmp_path, file_bytes)
    assert results[0] == results[1]
    message, left, newest = results[0]
    assert left == ["step-000001"]
    assert newest == 4
    assert "rank 1: OSError: [Errno 27] File too large" in message
    assert re.search(r"It needs [0-9,]{9,} bytes and [0-9,]{9,} are free", message)
    assert "lower trainer.keep" in message


def lone(directory, limit_s=60.0):
    return Checkpointer(
        directory, group=None, rank=0, world_size=1, keep=2, best_metric="x", limit_s=limit_s
    )


def test_a_directory_that_cannot_be_written_is_reported(tmp_path):
    checkpointer = lone(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "checkpoint").write_text("in the way")
    checkpointer.save(1, {"model": {"w": torch.ones(3)}}, {}, metrics={})
    with pytest.raises(RuntimeError, match=r"step-000001 was not written: .*Not a directory"):
        checkpointer.wait()


def test_waiting_for_a_save_is_bounded(tmp_path):
    checkpointer = lone(tmp_path, limit_s=0.05)
    (tmp_path / "step-000001.tmp").mkdir()
    # The writer blocks in open() until somebody reads.
    os.mkfifo(tmp_path / "step-000001.tmp" / "__0_0_0.distcp")
    checkpointer.save(1, {"model": {"w": torch.ones(3)}}, {}, metrics={})
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"step-000001 was not written within 0.05 s"):
        checkpointer.wait()
    assert time.monotonic() - start < 5
    (tmp_path / "step-000001.tmp" / "__0_0_0.distcp").open("rb").close()


def test_manifest_is_plain_json(two_steps):
    body = json.loads((two_steps[0] / "step-000002" / "manifest.json").read_text())["manifest"]
    assert body["step"] == 2
    assert body["metrics"] == {"train/loss": 1.0}
    assert set(body["files"]) == {"__0_0_0.distcp", "__1_0_0.distcp", ".metadata"}
