"""Files and directories appear whole or not at all; what was interrupted is removed whole."""

import resource
import signal
import threading

import pytest

from colospec.durable import clear, write


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


@pytest.mark.parametrize("name", [f"step-{n}.tmp" for n in range(20)])
def test_a_thread_that_still_writes_leaves_nothing(tmp_path, name):
    unfinished = tmp_path / name
    unfinished.mkdir()
    begun, refused = threading.Event(), threading.Event()

    def fill():
        for number in range(100_000):
            try:
                (unfinished / f"shard{number}").write_bytes(b"1")
            except FileNotFoundError:
                refused.set()
                return
            if number == 50:
                begun.set()

    writer = threading.Thread(target=fill)
    writer.start()
    assert begun.wait(10)
    clear(tmp_path)
    writer.join(20)
    assert refused.is_set()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_keeps_what_it_was(tmp_path):
    file = tmp_path / "result.json"
    write(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write(file, "new \ud800")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    write(file, "new")
    assert file.read_text() == "new"


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path):
    file = tmp_path / "report.json"
    write(file, "old")
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, previous[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(file, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, ignored)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
