"""Checks of the GPUs, of CUDA MPS, and of memory that two processes share."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import shutil
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path

from colospec.doctor.check import Line, fail, note, ok
from colospec.mps import gpus
from colospec.mps.control import PIPE_VARIABLE
from colospec.mps.errors import MpsError
from colospec.mps.start import Started, probe, start_keeper

_MIN_CAPABILITY = (9, 0)
_IPC_BYTES = 2**20


@functools.cache
def has_gpu() -> bool:
    """Tell whether the driver's program is here and lists a GPU (asked once)."""
    with contextlib.suppress(MpsError):
        return bool(gpus.installed())
    return False


def graphics_cards() -> Line:
    """Driver, and number, name and memory of the GPUs."""
    if shutil.which("nvidia-smi") is None:
        return _no_gpu("GPUs")
    try:
        found, chosen = gpus.installed(), gpus.visible()
    except MpsError as error:
        return fail(str(error), "nvidia-smi must list the GPUs; see its message")
    if not found:
        return _no_gpu("GPUs")
    first, kinds = found[0], {gpu.name for gpu in found}
    memory = f", {first.memory_mib / 1024:.0f} GiB each" if first.memory_mib else ""
    text = f"GPUs: driver {_ask_smi('driver_version')[0]}, {len(found)}x {', '.join(sorted(kinds))}"
    if len(chosen) < len(found):
        text += f", {len(chosen)} visible ({gpus.VISIBLE_VARIABLE})"
    return ok(text + memory) if len(kinds) == 1 else note(text + ": the slowest sets the pace")


def capability() -> Line:
    """SGLang's kernels are built for recent GPUs alone."""
    if not has_gpu():
        return _no_gpu("compute capability")
    lowest = min(tuple(map(int, word.split("."))) for word in _ask_smi("compute_cap"))
    text = f"compute capability {lowest[0]}.{lowest[1]}"
    if lowest >= _MIN_CAPABILITY:
        return ok(text)
    return note(f"{text}: SGLang is untested below 9.0", "engine=hf")


def torch_uses_gpus() -> Line:
    """torch's build fits the driver."""
    if not has_gpu():
        return _no_gpu("torch on a GPU")
    import torch

    if torch.version.cuda is None:
        return fail(f"torch {torch.__version__} is a CPU build", "install torch with CUDA")
    value = float(torch.ones(8, device="cuda").sum())
    if value != 8.0:
        return fail(f"torch added eight ones on the GPU to {value:g}", "try another GPU")
    return ok(f"torch runs on the GPU (CUDA {torch.version.cuda})")


def mps() -> Line:
    """A daemon of our own can be started, serves, and goes; or the user's serves."""
    if not has_gpu():
        return _no_gpu("CUDA MPS")
    started: Started | None = None
    try:
        uuids = gpus.uuid_list(gpus.visible())
        theirs = os.environ.get(PIPE_VARIABLE)
        if not theirs:
            started = start_keeper(os.getpid(), gpus=uuids)
        probe(Path(theirs) if theirs else _pipe(started), uuids)
    except MpsError as error:
        return fail(f"CUDA MPS: {error}", "or mps=auto (time slicing), or +mode=alternate")
    finally:
        if started is not None:
            started.keeper.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.keeper.wait(15)
    if started is not None and started.pipe.exists():
        return fail(f"the MPS daemon in {started.pipe} did not stop", f"kill {started.daemon}")
    whose = "your daemon" if theirs else "a private daemon"
    return ok(f"CUDA MPS: {whose} serves")


def _pipe(started: Started | None) -> Path:
    assert started is not None
    return started.pipe


def ipc() -> Line:
    """One process maps the GPU memory of another, as a ring does."""
    if not has_gpu():
        return _no_gpu("CUDA IPC")
    problem = _ipc_probe()
    if problem is None:
        return ok("CUDA IPC: two processes share GPU memory")
    return fail(f"CUDA IPC: {problem}",
                "one container and PID namespace for all ranks, or ring.payload=host")  # fmt: skip


def _ipc_probe() -> str | None:
    """Return what is wrong, or None. The exporter lives until the importer has let go."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    value = random.randrange(1, 256)
    exporter = context.Process(target=_ipc_export, args=(theirs, value))
    exporter.start()
    theirs.close()
    try:
        handle = ours.recv()
        back, other = context.Pipe()
        importer = context.Process(target=_ipc_import, args=(other, handle))
        importer.start()
        other.close()
        try:
            seen = back.recv()
        finally:
            importer.join(10)
        ours.send("done")
        exporter.join(10)
    except EOFError:
        return "a process that shares GPU memory crashed"
    if isinstance(seen, str):
        return seen
    return None if seen == [value, value] else f"wrote {value} everywhere, read {seen}"


def _ipc_export(connection: Connection, value: int) -> None:
    import torch

    from colospec.ring import device as gpu

    device = torch.device("cuda", 0)
    try:
        gpu.use_device(device)
        buffers = gpu.allocate(1, _IPC_BYTES)
        buffers[0].tensor(device).fill_(value)
        torch.cuda.synchronize(device)
        handle = gpu.export(buffers, required=True)
    except (RuntimeError, MemoryError) as error:
        handle = (f"error: {error}",)
    connection.send(handle)
    with contextlib.suppress(EOFError):
        connection.recv()


def _ipc_import(connection: Connection, handles: tuple[str, ...]) -> None:
    import torch

    from colospec.ring import device as gpu

    seen: list[int] | str
    if handles[0].startswith("error"):
        seen = handles[0]
    else:
        device = torch.device("cuda", 0)
        try:
            gpu.use_device(device)
            opened = gpu.open_exported(handles, _IPC_BYTES, required=True)
            assert opened is not None
            seen = opened[0].tensor(device)[[0, -1]].tolist()
        except RuntimeError as error:
            seen = str(error)
    connection.send(seen)


def _ask_smi(field: str) -> list[str]:
    words = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=20, check=True
    ).stdout.splitlines()


def _no_gpu(what: str) -> Line:
    return ok(f"{what}: no GPU: CPU runs work")
