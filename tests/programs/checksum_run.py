"""colospec.run whose engine and trainer both write a checksum of every micro-batch's features.

Each rank leaves RUN_DIR/checksums-RANK.json: cursor -> checksum. Used by tests/gpu/test_jobs.py.
"""

import json
import os
from pathlib import Path

import torch

from colospec import run
from colospec.train import produce, rank, trainer

SUMS = {}


def checksum(features):
    """A 64-bit sum over the bytes, weighted by their place, on the device."""
    total = torch.zeros((), dtype=torch.int64, device=features.aux_hidden_states.device)
    for tensor in (features.aux_hidden_states, features.last_hidden_states):
        words = tensor.contiguous().view(torch.int16).long().flatten()
        total += (words * torch.arange(1, len(words) + 1, device=words.device)).sum()
    return total


def note(cursor, features):
    SUMS[str(cursor)] = checksum(features)


class Wrapped:
    """An engine that notes what it captured."""

    def __init__(self, engine):
        self._engine = engine
        self.spec = engine.spec

    def capture(self, tokens, out):
        self._engine.capture(tokens, out)
        note(tokens.cursor, out)

    def close(self):
        self._engine.close()


def main():
    load_engine, check_lease = rank.load_engine, produce.check_lease

    def check_and_note(lease, tokens):
        check_lease(lease, tokens)
        note(lease.cursor, lease.features)

    rank.load_engine = lambda job, world: Wrapped(load_engine(job, world))
    trainer.check_lease = check_and_note
    try:
        run.main()
    finally:
        directory = Path(os.environ["CHECKSUMS"])
        sums = {cursor: int(value) for cursor, value in SUMS.items()}
        (directory / f"checksums-{os.environ['RANK']}.json").write_text(json.dumps(sums))


if __name__ == "__main__":
    main()
