"""Writer and Reader between real processes: order, mismatches, deaths, silence."""

import gc
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colospec.ring import Closed, Corrupt, PeerDied, PeerFailed, RingTimeout, SpecMismatch
from colospec.ring.channel import Reader, Writer
from colospec.ring.handshake import Offer, compare
from colospec.ring.memory import Process, SharedFile, map_foreign
from colospec.ring.spec import Agreement
from tests.ring.samples import SPEC, DirectoryStore, MemoryStore, open_ring, random_tokens, settings
from tests.ring.sides import (
    SMALL,
    be_engine,
    be_trainer,
    meet,
    process,
    publish,
    receive,
    tiny_batch,
)

SOON_S = 1.0


def test_ten_thousand_micro_batches_arrive_in_order_between_processes(tmp_path):
    with process(be_engine, tmp_path, SMALL, {}, 10_000, "end") as (_, report):
        reader = Reader(DirectoryStore(tmp_path), "0", SMALL, **settings())
        for index in range(10_000):
            receive(reader, index)
        assert reader.acquire(timeout_s=20) is None
        reader.close()
        assert report.recv() == "closed"
    stats = reader.stats()
    assert (stats.published, stats.released) == (10_000, 10_000)
    assert stats.engine.wait_s > 0
    assert stats.trainer.wait_s > 0


MISMATCHES = {
    "three tensors against two": ({"last_hidden_states": False}, {}, "last_hidden_states"),
    "another width": ({"hidden_size": 8}, {}, r"float32\[T, 8\]"),
    "another dtype": ({"dtype": torch.bfloat16}, {}, r"bfloat16\[T, 4\]"),
    "another layer count": ({"aux_layer_ids": (0, 1)}, {}, r"aux_hidden_states float32\[T, 8\]"),
    "another plan": ({}, {"plan_digest": "plan-2"}, "plan plan-2"),
    "more slots": ({}, {"num_slots": 4}, "num_slots 4"),
    "more tokens": ({}, {"max_tokens": 64}, "max_tokens 64"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatch_raises_on_both_sides_and_shows_both(case, tmp_path):
    spec_changes, changes, expected = MISMATCHES[case]
    other = replace(SMALL, **spec_changes)
    with process(be_engine, tmp_path, other, changes, 0, "end") as (_, report):
        with pytest.raises(SpecMismatch, match=expected) as caught:
            Reader(DirectoryStore(tmp_path), "0", SMALL, **settings())
        told = report.recv()
    assert told == f"SpecMismatch: {caught.value}"
    for text in ("engine:  aux_hidden_states", "trainer: aux_hidden_states", "plan plan-1"):
        assert text in told


def test_another_gpu_is_named_before_anything_is_mapped():
    terms = {
        "max_tokens": 8,
        "max_sequences": 8,
        "num_slots": 3,
        "plan_digest": "p",
        "boot_id": "b",
    }
    engine, trainer = (Agreement.of(SMALL, gpu_uuid=uuid, **terms) for uuid in ("GPU-1", "GPU-2"))
    with pytest.raises(SpecMismatch, match=r"CUDA_VISIBLE_DEVICES(.|\n)*GPU GPU-1(.|\n)*GPU GPU-2"):
        compare("0", engine=engine, trainer=trainer)


def test_killed_engine_is_drained_and_then_named(tmp_path):
    with process(be_engine, tmp_path, SMALL, {}, 2, "hang") as (child, report):
        reader = Reader(DirectoryStore(tmp_path), "0", SMALL, **settings())
        assert report.recv() == "hanging"
        child.kill()
        for index in range(2):
            receive(reader, index)
        began = time.monotonic()
        with pytest.raises(PeerDied, match=r"engine's process has died.*published 2, released 2"):
            reader.acquire(timeout_s=20)
        assert time.monotonic() - began < SOON_S
    reader.close()


def test_waiting_engine_sees_the_trainers_death(tmp_path):
    with process(be_trainer, tmp_path, SMALL, {}, 1, "hang") as (child, report):
        writer = Writer(DirectoryStore(tmp_path), "0", SMALL, **settings())
        for index in range(4):
            publish(writer, index)
        assert report.recv() == "hanging"
        threading.Timer(0.1, child.kill).start()
        began = time.monotonic()
        with pytest.raises(PeerDied, match="trainer's process has died"):
            writer.acquire(tiny_batch(4), timeout_s=20)
        assert time.monotonic() - began < SOON_S
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < SOON_S


def test_engine_with_free_slots_sees_the_trainers_death_at_once(tmp_path):
    with process(be_trainer, tmp_path, SMALL, {}, 0, "raise") as (child, _):
        writer = Writer(DirectoryStore(tmp_path), "0", SMALL, **settings())
        child.join(20)
        with pytest.raises(PeerDied):
            writer.acquire(tiny_batch(0), timeout_s=20)
    writer.close()


def test_failure_of_the_engine_carries_its_text_between_processes(tmp_path):
    with process(be_engine, tmp_path, SMALL, {}, 3, "fail") as (_, report):
        reader = Reader(DirectoryStore(tmp_path), "0", SMALL, **settings())
        for index in range(3):
            receive(reader, index)
        with pytest.raises(PeerFailed, match="ran out of memory") as caught:
            reader.acquire(timeout_s=20)
        assert caught.value.text == "the engine ran out of memory"
        reader.close()
        assert report.recv() == "closed"


def test_stopped_engine_is_a_timeout_that_names_its_phase_and_age(tmp_path):
    with process(be_engine, tmp_path, SMALL, {}, 1, "hang") as (child, report):
        reader = Reader(DirectoryStore(tmp_path), "0", SMALL, **settings())
        receive(reader, 0)
        report.recv()
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(RingTimeout, match=r"engine published no features.*engine working for"):
            reader.acquire(timeout_s=0.3)
        os.kill(child.pid, signal.SIGCONT)
    reader.close()


def test_stopped_trainer_is_a_timeout_that_names_its_phase_and_age(tmp_path):
    with process(be_trainer, tmp_path, SMALL, {}, 1, "hang") as (child, report):
        writer = Writer(DirectoryStore(tmp_path), "0", SMALL, **settings())
        publish(writer, 0)
        report.recv()
        os.kill(child.pid, signal.SIGSTOP)
        for index in range(1, 4):
            publish(writer, index)
        with pytest.raises(RingTimeout, match=r"trainer released no slot.*trainer working for \d"):
            writer.acquire(tiny_batch(4), timeout_s=0.3)
        os.kill(child.pid, signal.SIGCONT)


def test_close_of_the_reader_wakes_a_waiting_writer():
    writer, reader = open_ring(SMALL, num_slots=1)
    publish(writer, 0)
    threading.Timer(0.1, reader.close).start()
    with pytest.raises(Closed, match="wants no more"):
        writer.acquire(tiny_batch(1), timeout_s=20)
    writer.close()


def test_writer_waits_for_the_reader_before_it_lets_go():
    writer, reader = open_ring(SMALL)
    writer.end()
    closing = threading.Thread(target=writer.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    reader.close()
    closing.join(10)
    assert not closing.is_alive()


def test_writer_whose_trainer_does_not_close_warns_and_goes_on(caplog):
    store = MemoryStore()
    threading.Thread(target=lambda: Reader(store, "0", SMALL, **settings())).start()
    writer = Writer(store, "0", SMALL, **settings(timeout_s=1.0))
    writer.end()
    writer.close()
    assert "did not let go" in caplog.text


def test_ctrl_c_ends_a_wait():
    writer, reader = open_ring(SMALL)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        reader.acquire(timeout_s=20)
    assert time.monotonic() - began < SOON_S
    reader.close()
    writer.close()


def test_wait_does_not_hold_the_interpreter():
    writer, reader = open_ring(SMALL)
    ticks = []
    ticking = threading.Thread(target=lambda: ticks.extend(time.sleep(0.001) for _ in range(50)))
    ticking.start()
    with pytest.raises(RingTimeout):
        reader.acquire(timeout_s=0.5)
    assert len(ticks) == 50
    reader.close()
    writer.close()


def test_long_failure_text_keeps_its_beginning_and_its_end():
    writer, reader = open_ring(SMALL)
    writer.fail("begin " + "\N{EURO SIGN}" * 5000 + " end")
    with pytest.raises(PeerFailed) as caught:
        reader.acquire(timeout_s=1)
    assert caught.value.text.startswith("begin \N{EURO SIGN}")
    assert caught.value.text.endswith("\N{EURO SIGN} end")
    assert "\N{REPLACEMENT CHARACTER}" not in caught.value.text
    reader.close()
    writer.close()


def test_side_that_does_not_come_is_named():
    with pytest.raises(RingTimeout, match="engine of ring 5"):
        Reader(MemoryStore(), "5", SMALL, **settings(timeout_s=0.05))
    with pytest.raises(RingTimeout, match="trainer of ring 5"):
        Writer(MemoryStore(), "5", SMALL, **settings(timeout_s=0.05))


def forge(store, **changes):
    """A store whose engine's offer has a process with `changes`."""
    offer = Offer.from_bytes(store.get("ring/0/engine", timeout_s=20))
    store.set("ring/0/engine", replace(offer, process=replace(offer.process, **changes)).to_bytes())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"start_time": 1}, PeerDied, "its pid is another's"),
        ({"pid": 2**22 - 1}, PeerDied, "has died before"),
        ({"namespace": "pid:[1]"}, RuntimeError, "another PID namespace.*one container"),
    ],
)
def test_engine_that_cannot_be_reached_is_explained_on_both_sides(changes, error, message):
    store = MemoryStore()
    writer_error = meet(store)
    forge(store, **changes)
    with pytest.raises(error, match=message):
        Reader(store, "0", SMALL, **settings())
    refused = writer_error()
    assert isinstance(refused, PeerFailed)
    assert "could not attach" in str(refused)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[1]", b"null", b'{"process": 1}', b"\xff"])
def test_unreadable_offer_is_corrupt_and_the_engine_is_told(raw):
    store = MemoryStore()
    writer_error = meet(store)
    store.get("ring/0/engine", timeout_s=20)
    store.set("ring/0/engine", raw)
    with pytest.raises(Corrupt, match="one version"):
        Reader(store, "0", SMALL, **settings())
    assert isinstance(writer_error(), PeerFailed)


def test_memory_of_another_size_is_corrupt_and_withdrawn_memory_is_explained():
    me = Process.current()
    alive = me.watch()
    file = SharedFile("test", 4096)
    with pytest.raises(Corrupt, match="4096 bytes, expected 8192"):
        map_foreign(me, alive, file.fd, 8192)
    fd = file.fd
    file.close()
    with pytest.raises(PeerDied, match="withdrawn"):
        map_foreign(me, alive, fd, 4096)
    os.close(alive)


def test_shared_memory_cannot_be_resized():
    file = SharedFile("test", 4096)
    for nbytes in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(file.fd, nbytes)
    file.close()


def test_open_and_close_leaves_no_descriptor_and_no_mapping():
    def resources():
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return maps.count("memfd:colospec"), len(list(Path("/proc/self/fd").iterdir()))

    open_and_close()
    before = resources()
    for _ in range(20):
        open_and_close()
    assert resources() == before


def open_and_close():
    writer, reader = open_ring(SPEC)
    writer.acquire(random_tokens(0, num_tokens=4), timeout_s=1)
    writer.publish()
    with reader.acquire(timeout_s=1):
        pass
    reader.close()
    writer.close()
