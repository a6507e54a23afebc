"""The GPUs of a machine, by a fake nvidia-smi."""

import os
import random

import pytest

from colospec.mps import gpus
from colospec.mps.errors import MpsError

UUIDS = [f"GPU-{random.getrandbits(32):08x}-{i}" for i in range(4)]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """This process on a machine with four GPUs."""
    rows = "\n".join(f"{i}, {uuid}, {1000 * (i + 1)}, NVIDIA H200" for i, uuid in enumerate(UUIDS))
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{rows}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_visible_gpus_are_resolved_to_uuids_in_their_order(monkeypatch):
    assert [gpu.uuid for gpu in gpus.visible()] == UUIDS
    for value, wanted in [
        ("2,0", [UUIDS[2], UUIDS[0]]),
        (f"{UUIDS[3]}, 1", [UUIDS[3], UUIDS[1]]),
        (UUIDS[1][:9], [uuid for uuid in UUIDS if uuid.startswith(UUIDS[1][:9])]),
        ("1,-1,2", [UUIDS[1]]),
        ("", []),
    ]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert [gpu.uuid for gpu in gpus.visible()] == wanted
    assert gpus.installed()[2].memory_mib == 3000


@pytest.mark.parametrize(
    ("value", "words"), [("7", "'7' is not one of"), ("1,1", "twice"), ("MIG-1", "slices")]
)
def test_gpus_that_do_not_exist_are_named(monkeypatch, value, words):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(MpsError, match=words):
        gpus.visible()
