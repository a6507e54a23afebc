"""trainer.deterministic=true."""

import subprocess
import sys


def test_deterministic_kernels_are_chosen_for_torch_and_for_cublas():
    code = (
        "import os, torch; from colospec.train.deterministic import make_deterministic;"
        "make_deterministic();"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.split() == ["True", ":4096:8"], shown.stderr
