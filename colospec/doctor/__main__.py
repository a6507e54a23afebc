"""Command line of the doctor: one line per check: ok, note (works, but), or FAIL with the fix.

Nothing is left behind, whatever a check finds.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from colospec.doctor import gpu, host
from colospec.doctor.check import Check, run


def main(words: list[str] | None = None) -> int:
    """Run all checks, print their lines, and return 1 if one failed."""
    parser = argparse.ArgumentParser("python -m colospec.doctor", description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("outputs"), help="as run_dir")
    parser.add_argument("--cache-dir", type=Path, help="as data.cache_dir")
    arguments = parser.parse_args(words)
    gpu.has_gpu()  # the answer is inherited by the checks' processes
    failed = 0
    for check in checks(arguments.run_dir, arguments.cache_dir):
        line = run(check)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        failed += line.status == "FAIL"
    return 1 if failed else 0


def checks(run_dir: Path, cache_dir: Path | None) -> list[Check]:
    """Return all checks, in the order in which they are printed."""
    return [
        Check("versions", host.versions, 120.0),
        Check("extension", host.extension),
        Check("gpus", gpu.graphics_cards),
        Check("capability", gpu.capability),
        Check("torch", gpu.torch_uses_gpus, 120.0),
        Check("mps", gpu.mps, 120.0),
        Check("ipc", gpu.ipc, 120.0),
        Check("sglang patch", host.sglang_patch, 60.0),
        Check("processes", host.processes),
        Check("open files", host.open_files),
        Check("memlock", host.locked_memory),
        Check("/dev/shm", host.shared_memory),
        Check("disk of run_dir", partial(host.disk, run_dir, "run_dir")),
        Check("disk of cache", partial(host.cache_disk, cache_dir)),
    ]


if __name__ == "__main__":
    sys.exit(main())
