"""Either side of a small ring, in a process or in a thread of its own."""

import multiprocessing as mp
import threading
import time
from contextlib import contextmanager

import torch

from colospec.batch import Cursor, FeatureSpec, TokenBatch
from colospec.ring import SpecMismatch
from colospec.ring.channel import Reader, Writer
from tests.ring.samples import DirectoryStore, settings

SMALL = FeatureSpec((0,), last_hidden_states=True, hidden_size=4, dtype=torch.float32)


def tiny_batch(index):
    """One document of one token, which is `index`."""
    token, mask = torch.tensor([index]), torch.tensor([True])
    return TokenBatch.pack(Cursor(0, index, index), [index], [token], [mask])


def publish(writer, index, timeout_s=20.0):
    views = writer.acquire(tiny_batch(index), timeout_s=timeout_s)
    views.aux_hidden_states.fill_(index)
    views.last_hidden_states.fill_(-index)
    writer.publish()


def receive(reader, index, timeout_s=20.0):
    with reader.acquire(timeout_s=timeout_s) as lease:
        assert lease.cursor == Cursor(0, index, index)
        assert lease.digest == tiny_batch(index).digest
        assert lease.features.aux_hidden_states.eq(index).all()
        assert lease.features.last_hidden_states.eq(-index).all()


def be_engine(directory, spec, changes, num_batches, ending, report):
    """An engine process: publish, then end, fail, or wait to be killed."""
    try:
        writer = Writer(DirectoryStore(directory), "0", spec, **settings(**changes))
        for index in range(num_batches):
            publish(writer, index)
        if ending == "hang":
            report.send("hanging")
            time.sleep(60)
        writer.end() if ending == "end" else writer.fail("the engine ran out of memory")
        writer.close()
        report.send("closed")
    except Exception as error:
        report.send(f"{type(error).__name__}: {error}")


def be_trainer(directory, spec, changes, num_batches, ending, report):
    """A trainer process: read, then close, raise without closing, or wait to be killed."""
    try:
        reader = Reader(DirectoryStore(directory), "0", spec, **settings(**changes))
        for index in range(num_batches):
            receive(reader, index)
        report.send("hanging")
        if ending == "hang":
            time.sleep(60)
        if ending == "raise":
            raise ZeroDivisionError("in the trainer's step")
        reader.close()
    except SpecMismatch as error:
        report.send(f"{type(error).__name__}: {error}")


@contextmanager
def process(target, *arguments):
    """Run `target` in a process; gives (process, connection for its reports)."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.ring.sides"])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=target, args=(*arguments, there))
    child.start()
    there.close()
    try:
        yield child, here
    finally:
        child.kill()
        child.join(10)
        here.close()


def meet(store, spec=SMALL):
    """Start a Writer in a thread; return a function that waits for it and returns its error."""
    errors = []

    def write():
        try:
            Writer(store, "0", spec, **settings())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()

    def error():
        thread.join(20)
        return errors[0]

    return error
