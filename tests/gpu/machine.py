"""Which machine a test wants."""

import pytest
import torch


def needs_gpus(count):
    """Skip where fewer CUDA GPUs are visible; the reason says what to bring."""
    have = torch.cuda.device_count()
    plural = "" if count == 1 else "s"
    reason = f"needs {count} CUDA GPU{plural} (an H200 or another of sm_90), {have} visible"
    return pytest.mark.skipif(have < count, reason=reason)
