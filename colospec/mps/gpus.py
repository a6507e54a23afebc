"""The GPUs that this process may use, by UUID, found without a CUDA call.

An MPS daemon numbers the GPUs that it was given anew, so indices in CUDA_VISIBLE_DEVICES mean other
GPUs to its clients. With one list of UUIDs for daemon and clients, cuda:i keeps its meaning.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from colospec.mps.errors import MpsError

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_FIELDS = "index,uuid,memory.total,name"
_ASK_S = 30.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi lists it."""

    index: int
    uuid: str
    memory_mib: int | None
    """None where the driver does not say (memory shared with the CPU)."""
    name: str


def installed() -> list[Gpu]:
    """Return all GPUs of this machine in the order of nvidia-smi. Raises MpsError."""
    words = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except FileNotFoundError:
        raise MpsError("nvidia-smi is not on PATH; it comes with the NVIDIA driver") from None
    except subprocess.TimeoutExpired:
        raise MpsError(f"nvidia-smi did not answer within {_ASK_S:g} s; reset the GPU") from None
    except OSError as error:
        raise MpsError(f"nvidia-smi cannot be run: {error}") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        raise MpsError(f"nvidia-smi failed with code {done.returncode}: {said}")
    return [_parse(line) for line in done.stdout.splitlines() if line.strip()]


def visible() -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; all if it is not set.

    It may hold indices (those of nvidia-smi), UUIDs, or the beginnings of UUIDs. Raises MpsError
    for an entry that is none of them.
    """
    gpus = installed()
    wanted = os.environ.get(VISIBLE_VARIABLE)
    if wanted is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in (word.strip() for word in wanted.split(",")):
        if entry in ("", "-1"):
            break  # as CUDA does: what follows is not visible
        chosen.append(_find(entry, gpus, wanted))
    if len(set(chosen)) != len(chosen):
        raise MpsError(f"{VISIBLE_VARIABLE}={wanted} names a GPU twice; name each once")
    return chosen


def uuid_list(gpus: list[Gpu]) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES for the daemon and all its clients."""
    return ",".join(gpu.uuid for gpu in gpus)


def _find(entry: str, gpus: list[Gpu], wanted: str) -> Gpu:
    if entry.startswith("MIG-"):
        raise MpsError(
            f"{VISIBLE_VARIABLE}={wanted}: slices of a GPU (MIG) are not supported; name whole GPUs"
        )
    found = [gpu for gpu in gpus if str(gpu.index) == entry]
    found = found or [gpu for gpu in gpus if entry[:4] == "GPU-" and gpu.uuid.startswith(entry)]
    if len(found) != 1:
        known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus)
        raise MpsError(
            f"{VISIBLE_VARIABLE}={wanted}: {entry!r} is not one of this machine's GPUs: {known}"
        )
    return found[0]


def _parse(line: str) -> Gpu:
    fields = [field.strip() for field in line.split(",", 3)]
    if len(fields) != 4 or not fields[0].isdigit():
        raise MpsError(f"nvidia-smi answered {line!r} where {_FIELDS} was asked")
    index, uuid, memory, name = fields
    return Gpu(int(index), uuid, int(memory) if memory.isdigit() else None, name)
