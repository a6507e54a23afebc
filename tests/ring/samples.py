"""Random micro-batches and features, and stores for handshakes, for the tests of the ring."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from colospec.batch import Cursor, Features, FeatureSpec, TokenBatch
from colospec.ring.channel import Reader, Writer

SPEC = FeatureSpec(
    aux_layer_ids=(1, 3, 5), last_hidden_states=True, hidden_size=24, dtype=torch.bfloat16
)


def random_tokens(index, *, num_tokens, max_length=8):
    """A micro-batch of exactly `num_tokens` tokens in documents of random lengths."""
    lengths = []
    while sum(lengths) < num_tokens:
        lengths.append(min(random.randint(1, max_length), num_tokens - sum(lengths)))
    return TokenBatch.pack(
        Cursor(epoch=index // 7, micro_batch=index, step=index // 2),
        [random.randrange(1 << 40) for _ in lengths],
        [torch.randint(1 << 17, (length,)) for length in lengths],
        [torch.rand(length) < 0.5 for length in lengths],
    )


def random_features(spec, num_tokens):
    """Random bytes of the right shapes; NaN and Inf among them."""

    def draw(width):
        nbytes = num_tokens * width * spec.dtype.itemsize
        raw = torch.randint(256, (nbytes,), dtype=torch.uint8)
        return raw.view(spec.dtype).reshape(num_tokens, width)

    last = draw(spec.hidden_size) if spec.last_hidden_states else None
    return Features(draw(len(spec.aux_layer_ids) * spec.hidden_size), last)


def fill(views, features):
    """What an engine does with its views."""
    views.aux_hidden_states.copy_(features.aux_hidden_states)
    if features.last_hidden_states is not None:
        views.last_hidden_states.copy_(features.last_hidden_states)


def assert_same(found, expected):
    """Bit for bit, NaN included."""
    pairs = [
        (found.aux_hidden_states, expected.aux_hidden_states),
        (found.last_hidden_states, expected.last_hidden_states),
    ]
    for one, other in pairs:
        if other is None:
            assert one is None
            continue
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu().contiguous().view(torch.uint8), other.view(torch.uint8))


class MemoryStore:
    """A store for threads of one process."""

    def __init__(self):
        self._values = {}
        self._changed = threading.Condition()

    def set(self, key, value):
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key, *, timeout_s):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_s):
                raise TimeoutError(key)
            return self._values[key]


class DirectoryStore:
    """A store for processes: one file per key."""

    def __init__(self, directory):
        self._directory = Path(directory)

    def set(self, key, value):
        path = self._directory / key.replace("/", "-")
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(value)
        temporary.replace(path)

    def get(self, key, *, timeout_s):
        path = self._directory / key.replace("/", "-")
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(key)
            time.sleep(0.002)
        return path.read_bytes()


def settings(**changes):
    """Arguments that Writer and Reader share."""
    defaults = {
        "max_tokens": 32,
        "max_sequences": 32,
        "num_slots": 3,
        "plan_digest": "plan-1",
        "timeout_s": 30.0,
    }
    return defaults | changes


def open_ring(spec=SPEC, *, lease="view", poison=False, **changes):
    """Both sides of a shared-memory ring in this process: (writer, reader)."""
    store, both = MemoryStore(), settings(**changes)
    with ThreadPoolExecutor() as threads:
        writer = threads.submit(Writer, store, "0", spec, **both)
        reader = threads.submit(Reader, store, "0", spec, lease=lease, poison=poison, **both)
        return writer.result(), reader.result()
