"""One rank of a job that shares GPUs through MPS: bootstrap, start CUDA, prove, report, wait."""

import ctypes
import json
import os
import sys
from pathlib import Path

from torch.distributed import FileStore

from colospec.config import Mode, RunConfig
from colospec.mps.client import bootstrap
from colospec.store import JobStore
from colospec.topology import build


def main(directory, rank):
    """Write what became of the environment to DIRECTORY/RANK.json."""
    place = build(Mode.colocate, world_size=2, local_world_size=2, visible_gpus=1).places[rank]
    run = RunConfig(mode=Mode.colocate)
    run.mps.engine_priority = 1
    run.mps.limit_memory = True
    store = JobStore(FileStore(f"{directory}/store", 2))
    mps = bootstrap(run, place, store, limit_s=20)
    ctypes.CDLL("libcuda.so.1").cuInit(0)
    mps.prove_client(os.getpid())
    names = [n for n in os.environ if n.startswith("CUDA_")]
    report = {name: os.environ[name] for name in names} | {"pid": os.getpid()}
    half = Path(directory, f"{rank}.tmp")
    half.write_text(json.dumps(report))
    half.rename(Path(directory, f"{rank}.json"))
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
