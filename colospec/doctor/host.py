"""Checks of what is installed, and of what the operating system allows."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from colospec.doctor.check import Line, fail, note, ok
from colospec.doctor.gpu import has_gpu
from colospec.engine.sglang_install import check_installation

GIB = 2**30
_OPEN_FILES = 16384
_MIN_SHM = GIB
_MIN_DISK, _ENOUGH_DISK = 2 * GIB, 20 * GIB


def versions() -> Line:
    """Python, torch, transformers and, if installed, SGLang."""
    found = [f"versions: python {platform.python_version()}"]
    for name in ("torch", "transformers", "sglang"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    text = ", ".join(found)
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return fail(f"{text}; no {name}", "make install")
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return fail(f"{text}; python 3.11 or 3.12 is needed", "make install PYTHON=python3.12")
    if has_gpu() and importlib.util.find_spec("sglang") is None:
        return note(f"{text}; without sglang the target runs through transformers (engine=hf), "
                    "which is slower", "make install-gpu")  # fmt: skip
    if has_gpu() and importlib.util.find_spec("sgl_kernel") is None:
        return fail(f"{text}; sglang is here without its kernels", "make install-gpu, or engine=hf")
    return ok(text)


def extension() -> Line:
    """The C extension, and the driver library that it opens."""
    try:
        from colospec import _ring
    except ImportError as error:
        return fail(f"C extension: it does not load ({error})", "make install, or install-offline")
    if has_gpu() and (error_text := _ring.cuda_driver_error()):
        return fail(f"C extension: it cannot use the driver: {error_text}", "repair the driver")
    return ok("C extension: it loads")


def sglang_patch() -> Line:
    """The installed SGLang is one that the engine knows: as released, or exactly patched."""
    if importlib.util.find_spec("sglang") is None:
        return ok("sglang: not installed")
    try:
        return ok(f"sglang: {check_installation()}, as released or as patched by us")
    except RuntimeError as error:
        return fail(f"sglang: {error}", "see third_party/sglang_patch/README.md, or engine=hf")


def processes() -> Line:
    """Ranks watch each other by pidfd and open each other's memory through /proc."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            os.close(os.pidfd_open(child.pid))
            os.listdir(f"/proc/{child.pid}/fd")  # noqa: PTH208
        except OSError as error:
            return fail(f"processes: one cannot watch its child: {error}",
                        "allow pidfd_open and /proc (seccomp, hidepid, gVisor)")  # fmt: skip
        finally:
            child.kill()
    return ok("processes: they can watch each other (pidfd, /proc)")


def open_files() -> Line:
    """MPS wants many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"open files: {_limit(soft)} (at most {_limit(hard)})"
    if hard < 0 or hard >= _OPEN_FILES or not has_gpu():
        return ok(text)  # a daemon of ours raises its own limit
    return fail(f"{text}, MPS wants {_OPEN_FILES}", f"ulimit -n {_OPEN_FILES}, or docker --ulimit")


def locked_memory() -> Line:
    """Network cards register memory, which counts as locked."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft < 0 or not has_gpu():
        return ok(f"locked memory: {_limit(soft)} bytes")
    return note(f"locked memory: {soft} bytes, too little for NCCL over InfiniBand",
                "ulimit -l unlimited, if there are several nodes")  # fmt: skip


def shared_memory() -> Line:
    """NCCL puts its buffers there; the ring does not."""
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        return fail(f"/dev/shm: {error}", "mount a tmpfs there")
    text = f"/dev/shm: {size / GIB:.1f} GiB"
    if size >= _MIN_SHM or not has_gpu():
        return ok(text)
    return fail(f"{text}, NCCL wants {_MIN_SHM / GIB:g}", "docker run --shm-size=16g")


def cache_disk(cache_dir: Path | None) -> Line:
    """Tokenised data goes to the cache."""
    from colospec.data.cache import default_root

    return disk(cache_dir or default_root(), "data.cache_dir")


def disk(path: Path, setting: str) -> Line:
    """Free space where `path` is or would be made."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"{setting}: {free / GIB:.0f} GiB free in {there}"
    fix = f"{setting}=PATH on a larger disk"
    if not os.access(there, os.W_OK):
        return fail(f"{setting}: {there} cannot be written", fix)
    if free < _MIN_DISK:
        return fail(text, fix)
    return ok(text) if free >= _ENOUGH_DISK else note(f"{text}; checkpoints may fill it", fix)


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)
