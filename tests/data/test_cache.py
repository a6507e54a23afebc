"""Tokenised once: by one of many processes, in parallel, and never half."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from colospec.config import DataConfig
from colospec.data import __main__ as command_line
from colospec.data import cache, parallel, read
from colospec.data.dataset import prepare
from tests.data import rows

VOCAB_SIZE = 400


def open_data(path, tokenizer, root, **settings):
    config = DataConfig(path=str(path), **{"num_workers": 1, **settings})
    return prepare(config, tokenizer_path=tokenizer, vocab_size=VOCAB_SIZE, cache_dir=root)


@pytest.fixture
def lines(tmp_path):
    return rows.write_lines(tmp_path / "rows.jsonl", rows.mixed(60))


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """Enough rows to be busy with for a while."""
    return rows.write_lines(tmp_path_factory.mktemp("many") / "rows.jsonl", rows.mixed(4_000))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def inodes(root):
    return {path.name: path.stat().st_ino for path in root.glob("data-*/*")}


def test_second_opening_reads_what_the_first_wrote(lines, root, tokenizer_dirs):
    first = open_data(lines, tokenizer_dirs["chatml"], root)
    before = inodes(root)
    again = open_data(lines, tokenizer_dirs["chatml"], root)
    assert inodes(root) == before
    assert again.fingerprint == first.fingerprint
    assert again.lengths.tolist() == first.lengths.tolist()


def test_fingerprint_changes_with_all_that_changes_tokens_or_masks(lines, root, tokenizer_dirs):
    chatml = tokenizer_dirs["chatml"]
    settings = [
        {},
        {"max_length": 100},
        {"last_turn_only": True},
        {"last_turn_only": False},
        {"min_loss_tokens": 3},
    ]
    fingerprints = [
        open_data(lines, chatml, root, max_filtered_fraction=0.9, **it).fingerprint
        for it in settings
    ]
    fingerprints.append(open_data(lines, tokenizer_dirs["llama3"], root).fingerprint)
    more = rows.write_lines(lines.with_name("more.jsonl"), rows.mixed(61))
    fingerprints.append(open_data(more, chatml, root).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


def test_fingerprint_is_one_of_content_not_of_places(lines, root, tokenizer_dirs, tmp_path):
    first = open_data(lines, tokenizer_dirs["chatml"], root)
    other = tmp_path / "elsewhere"
    shutil.copytree(tokenizer_dirs["chatml"], other / "tokenizer")
    copied = shutil.copy(lines, other / "copied.jsonl")
    second = open_data(copied, other / "tokenizer", other / "cache", max_filtered_fraction=0.9)
    assert second.fingerprint == first.fingerprint


def test_rewritten_file_is_tokenised_anew(lines, root, tokenizer_dirs):
    os.utime(lines, (1, 1))
    first = open_data(lines, tokenizer_dirs["chatml"], root)
    rows.write_lines(lines, rows.mixed(60, seed=1))
    os.utime(lines, (1, 1))
    assert open_data(lines, tokenizer_dirs["chatml"], root).fingerprint != first.fingerprint


def test_settled_files_are_hashed_once(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    while time.time() - file.stat().st_ctime < cache.SETTLED_S + 0.1:
        time.sleep(0.1)
    options = cache.EncodeOptions(9, 9, None, 1)
    first = cache.fingerprint([file], tmp_path, options, root=tmp_path)
    (known,) = (tmp_path / "sha256").iterdir()
    assert cache.fingerprint([file], tmp_path, options, root=tmp_path) == first
    known.write_text("another")
    assert cache.fingerprint([file], tmp_path, options, root=tmp_path) != first


def test_cache_that_takes_no_hashes_costs_only_time(tmp_path):
    (tmp_path / "sha256").write_text("in the way")
    options = cache.EncodeOptions(9, 9, None, 1)
    settled = Path(os.__file__)
    digests = [
        cache.fingerprint([settled], tmp_path, options, root=root)
        for root in (tmp_path, tmp_path / "writable")
    ]
    assert (tmp_path / "writable" / "sha256").is_dir()
    assert digests[0] == digests[1]


def test_lock_that_cannot_be_written_is_a_clear_error(tmp_path):
    lock = tmp_path / "data.lock"
    lock.mkdir()
    with (
        pytest.raises(RuntimeError, match=r"data\.lock cannot be written: .*set data\.cache_dir"),
        cache.locked(lock),
    ):
        pass


def test_worker_processes_give_the_same_as_one(many_rows, root, tokenizer_dirs, monkeypatch):
    monkeypatch.setattr(parallel, "MIN_BYTES_PER_WORKER", 1)
    one = open_data(many_rows, tokenizer_dirs["chatml"], root / "one")
    two = open_data(many_rows, tokenizer_dirs["chatml"], root / "two", num_workers=2)
    assert many_rows.stat().st_size > 4 * read.CHUNK_BYTES
    for name in ("tokens.bin", "mask.bin", "offsets.bin", "manifest.json"):
        assert (one.directory / name).read_bytes() == (two.directory / name).read_bytes()


def _open_and_report(path, tokenizer, root, barrier, results):
    barrier.wait(60)
    dataset = open_data(path, tokenizer, root)
    results.put((dataset.fingerprint, int(dataset.token_counts.sum()), inodes(root)))


def test_ranks_that_start_at_once_tokenise_once(lines, root, tokenizer_dirs):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(3), spawn.Queue()
    arguments = (lines, tokenizer_dirs["chatml"], root, barrier, results)
    ranks = [spawn.Process(target=_open_and_report, args=arguments) for _ in range(2)]
    for rank in ranks:
        rank.start()
    _open_and_report(*arguments)
    reports = [results.get(timeout=60) for _ in range(3)]
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert reports[0] == reports[1] == reports[2]


def test_waiting_says_who_tokenises(tmp_path, caplog):
    lock = tmp_path / "data.lock"
    is_held, is_seen = threading.Event(), threading.Event()

    def hold():
        with cache.locked(lock):
            is_held.set()
            assert is_seen.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(10)
    threading.Timer(0.3, is_seen.set).start()
    with caplog.at_level("INFO", "colospec"), cache.locked(lock):
        assert is_seen.is_set()
    assert f"waiting for process {os.getpid()} on" in caplog.text
    holder.join()


def test_failed_build_leaves_nothing_and_the_next_one_succeeds(lines, root, tokenizer_dirs):
    with pytest.raises(ValueError, match="no chat template"):
        open_data(lines, tokenizer_dirs["none"], root)
    assert not list(root.glob("data-*/")) or all(p.suffix == ".lock" for p in root.glob("data-*"))
    assert len(open_data(lines, tokenizer_dirs["chatml"], root)) == 60


PREPARE = """
import sys
from pathlib import Path
from colospec.config import DataConfig
from colospec.data import parallel, read
from colospec.data.dataset import prepare
read.CHUNK_BYTES = 16 * 1024
parallel.MIN_BYTES_PER_WORKER = 1
if __name__ == "__main__":
    config = DataConfig(path=sys.argv[1], num_workers=2)
    prepare(config, tokenizer_path=Path(sys.argv[2]), vocab_size=400, cache_dir=Path(sys.argv[3]))
"""


def test_killed_build_leaves_no_process_and_is_never_opened(
    many_rows, root, tokenizer_dirs, tmp_path
):
    script = tmp_path / "prepare.py"
    script.write_text(PREPARE)
    tokenizer = tokenizer_dirs["chatml"]
    package = str(Path(cache.__file__).parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, inherited])}
    command = [sys.executable, str(script), str(many_rows), str(tokenizer), str(root)]
    builder = subprocess.Popen(command, env=environment)
    workers = []
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and not any(
        file.stat().st_size for file in root.glob("data-*.tmp/tokens.bin")
    ):
        workers = children(builder.pid)
        time.sleep(0.005)
    builder.send_signal(signal.SIGKILL)
    builder.wait(10)
    assert list(root.glob("data-*.tmp"))
    assert len(workers) >= 2
    while time.monotonic() < deadline and any(map(is_alive, workers)):
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
    dataset = open_data(many_rows, tokenizer, root)
    assert len(dataset) == 4_000
    assert not list(root.glob("data-*.tmp"))


def children(pid):
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_damaged_files_are_refused_with_what_to_delete(lines, root, tokenizer_dirs):
    dataset = open_data(lines, tokenizer_dirs["chatml"], root)
    with (dataset.directory / "tokens.bin").open("r+b") as stream:
        stream.truncate(8)
    with pytest.raises(RuntimeError, match=r"has 8 bytes instead of .*delete"):
        open_data(lines, tokenizer_dirs["chatml"], root)


def test_cache_directory_comes_from_the_settings_or_the_environment(
    lines, tmp_path, tokenizer_dirs, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    config = DataConfig(path=str(lines), num_workers=1)
    facts = {"tokenizer_path": tokenizer_dirs["chatml"], "vocab_size": VOCAB_SIZE}
    assert prepare(config, **facts).directory.parent == tmp_path / "xdg" / "colospec"
    named = dataclasses.replace(config, cache_dir=str(tmp_path / "named"))
    assert prepare(named, **facts).directory.parent == tmp_path / "named"


def test_command_line_tokenises_ahead_and_tells_what_came_of_it(lines, root, tokenizer_dirs):
    tokenizer = tokenizer_dirs["chatml"]
    words = [lines, "--tokenizer", tokenizer, "--cache-dir", root, "--vocab-size", VOCAB_SIZE]
    done = subprocess.run(
        [sys.executable, "-m", "colospec.data", *map(str, words), "--max-length", "150"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(cache.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    for word in ("samples", "too long", "supervised", "fill rate", str(root)):
        assert word in done.stdout
    before = inodes(root)
    open_data(lines, tokenizer, root, max_length=150)
    assert inodes(root) == before


def test_command_line_says_what_is_wrong_and_returns_1(tokenizer_dirs, monkeypatch, capsys):
    words = ["colospec.data", "nowhere.jsonl", "--tokenizer", str(tokenizer_dirs["chatml"])]
    monkeypatch.setattr(sys, "argv", [*words, "--vocab-size", "9"])
    assert command_line.main() == 1
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err
