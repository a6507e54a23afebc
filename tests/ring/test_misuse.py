"""Interrupts, forks, threads, stale keys and refusals: each ends in an error that says so."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from colospec.ring import Closed, Corrupt, PeerFailed, RingTimeout
from colospec.ring.channel import Reader, Writer
from colospec.ring.handshake import Offer
from colospec.ring.memory import SharedFile
from colospec.ring.spec import Note
from tests.ring.samples import DirectoryStore, MemoryStore, open_ring, settings
from tests.ring.sides import SMALL, meet, process, publish, receive

SOON_S = 1.0


def open_fds():
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def ring():
    writer, reader = open_ring(SMALL)
    yield writer, reader
    reader.close()
    writer.close()


class InterruptError(Exception):
    """What Ctrl-C is to a user; pytest itself listens to that."""


def test_slot_that_comes_with_an_interrupt_is_handed_out_again(ring):
    writer, reader = ring

    def interrupt(*_):
        raise InterruptError

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        for index in range(8):
            # One wait meets both: its piece ends with the slot, then signals are looked at.
            waiting = threading.Timer(0.3, interrupt_and_publish, (writer, index))
            waiting.start()
            with pytest.raises(InterruptError):
                reader.acquire(timeout_s=20)
            waiting.join()
            receive(reader, index)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert reader.fill == 0


def interrupt_and_publish(writer, index):
    # In this very thread, so that the signal is noted before the slot is there.
    signal.raise_signal(signal.SIGUSR1)
    publish(writer, index)


def test_interrupted_close_of_the_writer_lets_go_all_the_same():
    before = open_fds()
    writer, reader = open_ring(SMALL)
    writer.end()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    writer.close()
    reader.close()
    del writer, reader
    assert open_fds() <= before


def test_ring_in_a_forked_child_is_refused_and_stays_open_in_the_parent(ring):
    writer, reader = ring
    publish(writer, 0)
    pid = os.fork()
    if pid == 0:
        for call in (reader.close, writer.close, lambda: reader.acquire(timeout_s=1)):
            try:
                call()
            except RuntimeError as error:
                if "use a ring in the process that opened it" in str(error):
                    continue
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    receive(reader, 0)
    publish(writer, 1)
    receive(reader, 1)


def test_close_from_another_thread_than_the_one_that_waits_is_refused(ring):
    writer, reader = ring
    refusals = []

    def close():
        time.sleep(0.1)
        try:
            reader.close()
        except RuntimeError as error:
            refusals.append(str(error))

    thread = threading.Thread(target=close)
    thread.start()
    with pytest.raises(RingTimeout):
        reader.acquire(timeout_s=0.3)
    thread.join()
    assert "from one thread" in refusals[0]
    publish(writer, 0)
    receive(reader, 0)


def test_interpreter_ends_with_open_rings_and_a_thread_that_waits():
    code = (
        "import threading\n"
        "from tests.ring.samples import open_ring\n"
        "writer, reader = open_ring()\n"
        "wait = lambda: reader.acquire(timeout_s=60)\n"
        "threading.Thread(target=wait, daemon=True).start()\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 30


def test_answer_to_an_earlier_ring_is_not_taken_for_the_trainers():
    store = MemoryStore()
    writer_error = meet(store)
    Reader(store, "0", SMALL, **settings())
    assert_none(writer_error)
    with pytest.raises(RuntimeError, match="earlier ring 0; open each pair"):
        Writer(store, "0", SMALL, **settings())


def assert_none(error):
    with pytest.raises(IndexError):
        error()


def test_offer_that_names_another_ring_is_corrupt_for_the_trainer():
    store = MemoryStore()
    writer_error = meet(store)
    offer = Offer.from_bytes(store.get("ring/0/engine", timeout_s=20))
    store.set("ring/0/engine", replace(offer, ring_id="f" * 16).to_bytes())
    with pytest.raises(Corrupt, match="another ring, or other settings"):
        Reader(store, "0", SMALL, **settings())
    assert "earlier ring" in str(writer_error())


@pytest.mark.parametrize(
    ("before", "after"),
    [('"control_fd": ', '"control_fd": "../fd/", "x": '), ('"pid": ', '"pid": -'),
     ('"pid": ', '"pid": 99999999999'), ('"error": null', '"x": null')],
)  # fmt: skip
def test_offer_with_impossible_fields_is_corrupt(before, after):
    store = MemoryStore()
    writer_error = meet(store)
    raw = store.get("ring/0/engine", timeout_s=20).decode()
    assert before in raw
    store.set("ring/0/engine", raw.replace(before, after).encode())
    with pytest.raises(Corrupt, match="one version"):
        Reader(store, "0", SMALL, **settings())
    assert isinstance(writer_error(), PeerFailed)


@pytest.mark.parametrize("change", [{"num_tokens": 33}, {"num_sequences": 33}])
def test_header_of_more_than_a_slot_holds_is_corrupt(ring, change):
    writer, reader = ring
    note = Note(0, 0, 0, 0, num_tokens=32, num_sequences=32)
    writer._link.ring.publish(note.to_bytes())
    with reader.acquire(timeout_s=1) as lease:
        assert lease.features.aux_hidden_states.shape[0] == 32
    writer._link.ring.publish(note._replace(**change).to_bytes())
    with pytest.raises(Corrupt, match="number of tokens or sequences"):
        reader.acquire(timeout_s=1)


class StoreWithoutAnswers(MemoryStore):
    """Loses what the trainer says."""

    def set(self, key, value):
        if not key.endswith("trainer"):
            super().set(key, value)


def test_trainer_whose_answer_came_too_late_hears_that_the_engine_gave_up():
    store = StoreWithoutAnswers()
    readers = []
    attach = threading.Thread(
        target=lambda: readers.append(Reader(store, "0", SMALL, **settings()))
    )
    attach.start()
    with pytest.raises(RingTimeout, match="trainer of ring 0"):
        Writer(store, "0", SMALL, **settings(timeout_s=0.5))
    attach.join()
    with pytest.raises(PeerFailed, match="gave up at the handshake: RingTimeout"):
        readers[0].acquire(timeout_s=20)
    readers[0].close()


class BrokenStore(MemoryStore):
    """Fails when the trainer answers."""

    def set(self, key, value):
        if key.endswith("trainer"):
            raise ConnectionError("the store is gone")
        super().set(key, value)


def test_store_that_breaks_at_the_answer_leaves_no_descriptor():
    store = BrokenStore()
    engine = threading.Thread(target=lambda: meet_quietly(store))
    engine.start()
    store.get("ring/0/engine", timeout_s=20)
    before = open_fds()
    with pytest.raises(ConnectionError, match="the store is gone"):
        Reader(store, "0", SMALL, **settings())
    assert open_fds() <= before
    engine.join(20)


def meet_quietly(store):
    with pytest.raises(RingTimeout):
        Writer(store, "0", SMALL, **settings(timeout_s=4.0))


def test_file_that_cannot_be_made_leaves_no_descriptor():
    before = open_fds()
    with pytest.raises(OverflowError):
        SharedFile("test", 1 << 63)
    assert open_fds() <= before


def be_engine_until_closed(store_directory, report):
    """Publish for ever; SIGTERM sets a flag, as in a run."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    writer = Writer(DirectoryStore(store_directory), "0", SMALL, **settings())
    report.send("attached")
    index = 0
    try:
        while True:
            publish(writer, index)
            index += 1
    except Closed:
        writer.close()
        report.send("closed")


def test_sigterm_to_both_sides_ends_in_the_trainers_order(tmp_path):
    flags = []
    previous = signal.signal(signal.SIGTERM, lambda *_: flags.append(True))
    try:
        with process(be_engine_until_closed, tmp_path) as (engine, report):
            reader = Reader(DirectoryStore(tmp_path), "0", SMALL, **settings())
            assert report.recv() == "attached"
            for index in range(5):
                receive(reader, index)
            for pid in (engine.pid, os.getpid()):
                os.kill(pid, signal.SIGTERM)
            receive(reader, 5)
            began = time.monotonic()
            reader.close()
            assert report.recv() == "closed"
            assert time.monotonic() - began < SOON_S
            engine.join(20)
            assert engine.exitcode == 0
        assert flags == [True]
    finally:
        signal.signal(signal.SIGTERM, previous)


FOREIGN = """
import ctypes, os, signal, sys, time
from colospec.ring.errors import PeerDied
from colospec.ring.memory import Process, SharedFile, map_foreign
file = SharedFile("test", 4096)
pid = os.fork()
if pid == 0:
    ctypes.CDLL(None).prctl(4, 0)
    time.sleep(60)
time.sleep(0.2)
child = Process(pid, 0, "", os.getuid())
pidfd = os.pidfd_open(pid)
for _ in range(2):
    try:
        map_foreign(child, pidfd, file.fd, 4096)
    except (RuntimeError, PeerDied) as error:
        print(type(error).__name__, error)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_guarded_process_of_the_same_user_is_explained_and_a_dead_one_is_dead():
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", FOREIGN],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "Permission denied" in done.stderr:
        pytest.skip("user 65534 cannot read this installation; run where it can")
    guarded, dead = done.stdout.splitlines()
    assert guarded.startswith("RuntimeError")
    assert "--cap-add=SYS_PTRACE" in guarded
    assert dead.startswith("PeerDied")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_process_of_another_user_is_told_so():
    file = SharedFile("test", 4096)
    code = (
        "import sys; from colospec.ring.memory import *\n"
        f"try: map_foreign(Process({os.getpid()}, 0, '', 0), os.pidfd_open({os.getpid()}), "
        f"{file.fd}, 4096)\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    file.close()
    if "Permission denied" in done.stderr:
        pytest.skip("user 65534 cannot read this installation; run where it can")
    assert "belongs to uid 0, this process runs as uid 65534" in done.stdout
