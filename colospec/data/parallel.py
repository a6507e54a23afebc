"""Tokenise in several processes, keeping the order of the rows."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

from colospec.data.encode import Encoded, EncodeOptions, Encoder
from colospec.data.read import Chunk

# A process needs 2 to 10 s to start, and then encodes some 4 MB of chats a second; below this much
# input for each, one does it sooner alone.
MIN_BYTES_PER_WORKER = 16 * 1024 * 1024
# Chunks handed out ahead per worker; bounds the memory whatever the size of the input.
CHUNKS_AHEAD = 3

_encoder: Encoder | None = None  # of a worker process


def choose_num_workers(num_workers: int | None, num_bytes: int) -> int:
    """Return how many processes to use for `num_bytes` of input; None is one per core."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(num_workers or cores, num_bytes // MIN_BYTES_PER_WORKER))


def encode_chunks(
    chunks: Iterator[Chunk], tokenizer_path: Path, options: EncodeOptions, *, num_workers: int
) -> Iterator[Encoded]:
    """Encode chunks in `num_workers` processes (1: in this one) and yield them in order.

    Raises what `Encoder` raises, and RuntimeError if a worker dies.
    """
    encoder = Encoder(tokenizer_path, options)  # with workers: to fail here and not in them
    if num_workers == 1:
        yield from map(encoder.encode, chunks)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        # Ranks have threads (watchdog, store), which a fork would not survive.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_path, options),
    )
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode, chunk))
            if len(pending) > CHUNKS_AHEAD * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a tokenising process died: killed for lack of memory, or started by a script without "
            'if __name__ == "__main__"; '
            f"use fewer than {num_workers} with data.num_workers=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer_path: Path, options: EncodeOptions) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer_path, options)


def _die_with_parent() -> None:
    """End this process when the parent is gone: a killed parent cannot end its pool."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(chunk: Chunk) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(chunk)
