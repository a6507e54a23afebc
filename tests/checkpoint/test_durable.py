"""What an interrupted save leaves behind is removed whole, even while it is still being written."""

import threading

import pytest

from colospec.checkpoint.durable import clear


def test_whole_directories_stay_and_unfinished_ones_go(tmp_path):
    for name in ("step-000001", "step-000002.tmp", "step-000000.gone.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_bytes(b"1")
    removed = clear(tmp_path)
    assert [path.name for path in removed] == ["step-000000.gone.tmp", "step-000002.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_directory_put_aside_comes_back_instead(tmp_path):
    aside = tmp_path / "step-000003.old.tmp"
    aside.mkdir()
    (aside / "shard").write_bytes(b"1")
    assert clear(tmp_path) == []
    assert (tmp_path / "step-000003" / "shard").read_bytes() == b"1"


@pytest.mark.parametrize("attempt", range(20))
def test_a_thread_that_still_writes_leaves_nothing(tmp_path, attempt):
    unfinished = tmp_path / "step-000004.tmp"
    unfinished.mkdir()
    begun, refused = threading.Event(), threading.Event()

    def write():
        for number in range(100_000):
            try:
                (unfinished / f"shard{number}").write_bytes(b"1")
            except FileNotFoundError:
                refused.set()
                return
            if number == 50:
                begun.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert begun.wait(10)
    clear(tmp_path)
    writer.join(20)
    assert refused.is_set()
    assert list(tmp_path.iterdir()) == []
