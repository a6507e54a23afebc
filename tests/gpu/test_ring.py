"""The ring in GPU memory: conformance, stream order, two processes, and the death of either."""

import hashlib
import multiprocessing as mp
import os
import random
import time
from contextlib import contextmanager

import pytest
import torch

from colospec import _ring
from colospec.batch import FeatureSpec
from colospec.ring import PeerDied, SpecMismatch
from colospec.ring.channel import Reader, Writer
from tests.gpu import machine
from tests.ring.conformance import Conformance
from tests.ring.samples import DirectoryStore, open_ring, random_tokens, settings

pytestmark = [pytest.mark.gpu, machine.needs_gpus(1)]

SPEC = FeatureSpec((1, 3, 5), last_hidden_states=True, hidden_size=1024, dtype=torch.bfloat16)
MAX_TOKENS = 4096
PATIENCE_S = 60.0
SOON_S = 1.0
LONG_CYCLES = 400_000_000  # about 0.2 s
SIZES = {"max_tokens": MAX_TOKENS, "max_sequences": MAX_TOKENS, "timeout_s": PATIENCE_S}


NEED_VIEWS = ("full_channel", "out_of_order", "view_of_a_released_lease", "stats_count")


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """Load the kernels: the suite's deadlines are short."""
    writer, reader = open_ring(SPEC, poison=True, **on_gpu(**SIZES))
    for index in range(3):
        publish(writer, index, 1)
        with reader.acquire(timeout_s=PATIENCE_S) as lease:
            lease.features.aux_hidden_states.clone().eq(1).all().item()
    reader.close()
    writer.close()


def on_gpu(**changes):
    return {"device": torch.device("cuda:0"), **changes}


class TestGpuRing(Conformance):
    def open(self, spec, **options):
        return open_ring(spec, **on_gpu(**options))


class TestPinnedHostRing(Conformance):
    def open(self, spec, **options):
        return open_ring(spec, **on_gpu(payload="host", **options))

    @pytest.fixture(autouse=True)
    def _views_only(self, request):
        if any(name in request.node.name for name in NEED_VIEWS):
            pytest.skip("slots in host memory are copied out and freed at once")


class TestGpuRingWithoutStreamWrites(Conformance):
    """A host callback writes the counters."""

    @pytest.fixture(autouse=True)
    def _no_stream_writes(self, monkeypatch):
        monkeypatch.setattr(_ring, "can_write_from_stream", lambda: False)

    def open(self, spec, **options):
        return open_ring(spec, **on_gpu(**options))


@pytest.fixture
def pair():
    writer, reader = open_ring(SPEC, **on_gpu(num_slots=1, **SIZES))
    yield writer, reader
    reader.close()
    writer.close()


def publish(writer, index, value, timeout_s=PATIENCE_S):
    views = writer.acquire(random_tokens(index, num_tokens=100), timeout_s=timeout_s)
    views.aux_hidden_states.fill_(value)
    views.last_hidden_states.fill_(-value)
    writer.publish()


def test_slot_is_not_seen_before_the_stream_has_filled_it(pair):
    writer, reader = pair
    torch.cuda._sleep(LONG_CYCLES)
    began = time.monotonic()
    publish(writer, 0, 7)
    assert time.monotonic() - began < 0.05, "publishing waits for nothing"
    with (
        reader.acquire(timeout_s=PATIENCE_S) as lease,
        torch.cuda.stream(torch.cuda.Stream()),  # no other order between the two than the ring's
    ):
        assert lease.features.aux_hidden_states.eq(7).all()
    assert time.monotonic() - began > 0.05


def test_slot_is_not_free_before_the_stream_has_read_it(pair):
    writer, reader = pair
    publish(writer, 0, 1)
    lease = reader.acquire(timeout_s=PATIENCE_S)
    torch.cuda._sleep(LONG_CYCLES)
    copy = lease.features.aux_hidden_states.clone()
    began = time.monotonic()
    lease.release()
    assert time.monotonic() - began < 0.05, "releasing waits for nothing"
    with torch.cuda.stream(torch.cuda.Stream()):
        publish(writer, 1, 2)
    assert copy.eq(1).all()


def test_released_slots_can_be_poisoned_in_stream_order():
    writer, reader = open_ring(SPEC, poison=True, **on_gpu(num_slots=2, **SIZES))
    publish(writer, 0, 3)
    lease = reader.acquire(timeout_s=PATIENCE_S)
    view = lease.features.aux_hidden_states
    copy = view.clone()
    lease.release()
    assert copy.eq(3).all()
    assert view.isnan().all()
    reader.close()
    writer.close()


def test_memory_goes_back_when_both_sides_have_closed():
    def open_and_close():
        writer, reader = open_ring(SPEC, **on_gpu(**SIZES))
        publish(writer, 0, 1)
        with reader.acquire(timeout_s=PATIENCE_S):
            pass
        reader.close()
        writer.close()

    open_and_close()
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(5):
        open_and_close()
    assert abs(torch.cuda.mem_get_info()[0] - free) < 2**20


def fingerprint(features):
    """A digest of the bytes that lie in the slot."""
    both = torch.cat([features.aux_hidden_states, features.last_hidden_states], dim=-1)
    return hashlib.sha256(both.view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


def be_engine(directory, changes, num_batches, ending, report):
    """Publish random features of random lengths, then end as told; report their fingerprints."""
    torch.manual_seed(os.getpid())
    writer = Writer(DirectoryStore(directory), "0", SPEC, **settings(**changes))
    digests = []
    for index in range(num_batches):
        views = writer.acquire(
            random_tokens(index, num_tokens=random.randint(0, MAX_TOKENS)), timeout_s=PATIENCE_S
        )
        views.aux_hidden_states.normal_()
        views.last_hidden_states.normal_()
        digests.append(fingerprint(views))
        writer.publish()
    report.send(digests)
    if ending == "copy for ever":
        views = writer.acquire(random_tokens(0, num_tokens=MAX_TOKENS), timeout_s=PATIENCE_S)
        while True:
            views.aux_hidden_states.copy_(views.aux_hidden_states.flip(0))
    writer.end()
    writer.close()
    report.send("closed")


def be_trainer(directory, changes, num_batches, report):
    """Read slots, then go on reading the last one for ever."""
    reader = Reader(DirectoryStore(directory), "0", SPEC, **settings(**changes))
    for _ in range(num_batches):
        reader.acquire(timeout_s=PATIENCE_S).release()
    lease = reader.acquire(timeout_s=PATIENCE_S)
    report.send("reading")
    while True:
        lease.features.aux_hidden_states.float().sum()


@contextmanager
def process(target, *args, environment=()):
    """A fresh process (CUDA does not survive a fork) with a connection to it."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    before = dict(os.environ)
    os.environ.update(dict(environment))
    try:
        child = context.Process(target=target, args=(*args, there))
        child.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        yield child, here
    finally:
        child.kill()
        child.join(30)
        here.close()


@pytest.mark.parametrize("payload", ["ipc", "host"])
@pytest.mark.parametrize("lease", ["view", "copy"])
@pytest.mark.parametrize("segments", ["True", "False"])
def test_300_micro_batches_of_random_lengths_arrive_bit_for_bit(tmp_path, payload, lease, segments):
    changes = on_gpu(payload=payload, **SIZES)
    environment = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{segments}"}
    with process(be_engine, tmp_path, changes, 300, "end", environment=environment) as (_, report):
        reader = Reader(DirectoryStore(tmp_path), "0", SPEC, lease=lease, **settings(**changes))
        found = []
        while (taken := reader.acquire(timeout_s=PATIENCE_S)) is not None:
            with taken:
                found.append(fingerprint(taken.features))
        assert report.recv() == found
        reader.close()
        assert report.recv() == "closed"
    assert len(found) == 300


def assert_gpu_works():
    product = torch.ones(512, 512, device="cuda") @ torch.ones(512, 512, device="cuda")
    assert product.eq(512).all()


def test_engine_killed_in_the_middle_of_a_copy_is_named_within_a_second(tmp_path):
    changes = on_gpu(**SIZES)
    for _ in range(2):  # and the next run works at once
        with process(be_engine, tmp_path, changes, 2, "copy for ever") as (child, report):
            reader = Reader(DirectoryStore(tmp_path), "0", SPEC, **settings(**changes))
            digests = report.recv()
            found = []
            for _ in range(2):
                with reader.acquire(timeout_s=PATIENCE_S) as lease:
                    found.append(fingerprint(lease.features))
            assert found == digests
            time.sleep(0.2)
            child.kill()
            began = time.monotonic()
            with pytest.raises(PeerDied, match="published 2, released 2"):
                reader.acquire(timeout_s=PATIENCE_S)
            assert time.monotonic() - began < SOON_S
            reader.close()
        assert_gpu_works()
        for file in tmp_path.iterdir():
            file.unlink()


def test_trainer_killed_while_it_reads_is_named_within_a_second(tmp_path):
    changes = on_gpu(num_slots=1, **SIZES)
    with process(be_trainer, tmp_path, changes, 3) as (child, report):
        writer = Writer(DirectoryStore(tmp_path), "0", SPEC, **settings(**changes))
        for index in range(4):
            publish(writer, index, index)
        assert report.recv() == "reading"
        child.kill()
        began = time.monotonic()
        with pytest.raises(PeerDied, match="trainer's process has died"):
            publish(writer, 4, 4)
        assert time.monotonic() - began < SOON_S
        writer.close()
    assert_gpu_works()


@pytest.mark.multi_gpu
@machine.needs_gpus(2)
def test_engine_on_another_gpu_is_refused_on_both_sides(tmp_path):
    with process(be_engine, tmp_path, on_gpu(**SIZES), 0, "end"):
        elsewhere = on_gpu(**SIZES) | {"device": torch.device("cuda:1")}
        with pytest.raises(SpecMismatch, match="CUDA_VISIBLE_DEVICES"):
            Reader(DirectoryStore(tmp_path), "0", SPEC, **settings(**elsewhere))
