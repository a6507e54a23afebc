"""`trainer.deterministic=true`: the same seed gives the same losses, bit for bit."""

from __future__ import annotations

import os

import torch

WORKSPACE = ":4096:8"


def make_deterministic() -> None:
    """Use deterministic kernels alone, in this process and from now on.

    Call it before the first CUDA call: cuBLAS reads its setting when it starts. Flash attention's
    backward follows the same switch. Raises RuntimeError where CUDA has started already.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError("make_deterministic after the first CUDA call has no effect on cuBLAS")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(True)
    # It would fill all fresh memory, to make reads of it reproducible; nothing here reads any.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
