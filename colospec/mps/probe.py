"""A process that does nothing but start CUDA, say so, and wait to be let go.

It uses the driver library alone: a failure is MPS's and not torch's, and it takes a second.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable


def main() -> int:
    """Make a context on the first visible GPU and report it as one line of JSON on stdout."""
    error = _start_cuda()
    sys.stdout.write(json.dumps({"error": error} if error else {"ready": "yes"}) + "\n")
    sys.stdout.flush()
    if error is None:
        sys.stdin.read()
    return 1 if error else 0


def _start_cuda() -> str | None:
    """Return what failed, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"the NVIDIA driver cannot be loaded: {error}"
    device, context = ctypes.c_int(), ctypes.c_void_p()
    calls: tuple[tuple[str, Callable[[], int]], ...] = (
        ("cuInit", lambda: driver.cuInit(0)),
        ("cuDeviceGet", lambda: driver.cuDeviceGet(ctypes.byref(device), 0)),
        (
            "cuDevicePrimaryCtxRetain",
            lambda: driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        ),
    )
    for name, call in calls:
        if code := call():
            text = ctypes.c_char_p()
            driver.cuGetErrorString(code, ctypes.byref(text))
            said = (text.value or b"unknown error").decode()
            return f"{name}: CUDA error {code} ({said})"
    return None


if __name__ == "__main__":
    sys.exit(main())
