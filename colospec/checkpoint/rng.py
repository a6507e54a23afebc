"""The random state of one rank as one tensor of fixed length, so that a checkpoint can hold it.

Layout of the uint8 tensor [RNG_BYTES]: one byte that is 1 if the rank has a GPU, torch's CPU
generator (5056 bytes), CUDA's (16, zeros without a GPU), the trainer's own generator (5056, of
which one on CUDA fills 16), numpy's and Python's. Each rank stores its own state and gets back only
its own: with rank 0's on all ranks, the ranks would draw the same numbers.
"""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import torch
from torch import Tensor

_CPU_BYTES = torch.Generator().get_state().numel()
_CUDA_BYTES = 16
_NUMPY = struct.Struct("<624Iiid")
_PYTHON = struct.Struct("<625I?d")
_PARTS = (1, _CPU_BYTES, _CUDA_BYTES, _CPU_BYTES, _NUMPY.size, _PYTHON.size)
RNG_BYTES = sum(_PARTS)


def capture_rng(generator: torch.Generator, *, rank: int) -> dict[str, Tensor]:
    """Return {str(rank): state [RNG_BYTES] uint8} of this rank, for the "rng" of a checkpoint."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, words, next_gauss = random.getstate()
    python = _PYTHON.pack(*words, next_gauss is not None, next_gauss or 0.0)
    numpy = _NUMPY.pack(*keys, position, has_gauss, gauss)
    on_cuda = generator.device.type == "cuda"
    cuda = torch.cuda.get_rng_state(generator.device) if on_cuda else torch.empty(0)
    state = torch.cat(
        [
            torch.tensor([on_cuda], dtype=torch.uint8),
            torch.get_rng_state(),
            _padded(cuda, _CUDA_BYTES),
            _padded(generator.get_state(), _CPU_BYTES),
            torch.frombuffer(bytearray(numpy + python), dtype=torch.uint8),
        ]
    )
    return {str(rank): state}


def restore_rng(
    states: dict[str, Tensor], generator: torch.Generator, *, rank: int, seed: int, step: int
) -> None:
    """Set all generators of this rank to the state that `capture_rng` saw.

    A rank that the checkpoint does not have (more trainers than before, or another kind of device)
    is seeded from (seed, rank, step): other numbers than the other ranks', and than at the start.
    """
    on_cuda = generator.device.type == "cuda"
    state = states.get(str(rank))
    if state is None or bool(state[0]) != on_cuda:
        seed_rng(rank_seed(seed, rank, step), generator)
        return
    # set_state wants memory that begins at its own storage.
    parts = [part.clone() for part in torch.split(state.cpu(), list(_PARTS))]
    _, cpu, cuda, own, numpy, python = parts
    torch.set_rng_state(cpu)
    if on_cuda:
        torch.cuda.set_rng_state(cuda, generator.device)
    generator.set_state(own[: generator.get_state().numel()].clone())
    *keys, position, has_gauss, gauss = _NUMPY.unpack(numpy.numpy().tobytes())
    key_array = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", key_array, position, has_gauss, gauss))
    *words, has_next, next_gauss = _PYTHON.unpack(python.numpy().tobytes())
    random.setstate((3, tuple(words), next_gauss if has_next else None))


def rank_seed(seed: int, rank: int, step: int) -> int:
    """Return the 63-bit seed of a rank that starts at `step` without a stored state."""
    digest = hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_rng(seed: int, generator: torch.Generator) -> None:
    """Seed every generator of this rank."""
    torch.manual_seed(seed)
    generator.manual_seed(seed + 1)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _padded(state: Tensor, length: int) -> Tensor:
    padded = torch.zeros(length, dtype=torch.uint8)
    padded[: state.numel()] = state
    return padded
