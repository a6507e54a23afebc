"""The job's shared keys: torchrun's key-value store, with deadlines that say who is awaited.

There is no control process group: a barrier, a digest to compare, a cursor to hand over and the
first error are keys here, because a collective cannot carry an error to ranks that are not in it.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistStoreError, PrefixStore, Store
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

ERROR_KEY = "error/first"
STOP_KEY = "stop"
AGENT_S = 60.0
"""How long the store of a torchrun may take to answer."""


class StoreUnreachable(RuntimeError):
    """There is no way to join the job."""


def stop_key(node: int) -> str:
    """Return the key that says that a rank of `node` was asked to stop; set before STOP_KEY."""
    return f"{STOP_KEY}/{node}"


class JobStore:
    """A view of torchrun's store. One thread each: a blocked client blocks all its users."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def connect(cls, *, timeout_s: float) -> JobStore:
        """Join the store that torchrun's environment variables name (all ranks).

        Raises StoreUnreachable where that fails.
        """
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        fault = f"the ranks did not all join torchrun's store at {address}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # It was there before any rank: one that does not answer is gone.
            timeout_s = min(timeout_s, AGENT_S)
            fault = (
                f"torchrun's store at {address} did not answer: the first node has ended the job, "
                "or cannot be reached from here; see what it said"
            )
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        except DistError as error:
            said = str(error).splitlines()[0]
            raise StoreUnreachable(f"{fault} (after {timeout_s:g} s: {said})") from error
        store.set_timeout(default_pg_timeout)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"colospec/{attempt}", store))

    def clone(self) -> JobStore:
        """Return a view with a connection of its own, for another thread."""
        return JobStore(self._store.clone())  # type: ignore[attr-defined]

    def role_store(self, name: str) -> Store:
        """Return the part of the store on which the process world `name` is built."""
        return PrefixStore(name, self._store)

    def set(self, key: str, value: bytes) -> None:
        """Write `key`."""
        self._store.set(key, value.decode())

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait for `key` and return it. Raises TimeoutError naming it."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except DistStoreError as error:
            raise TimeoutError(f"nobody set the key {key!r} within {timeout_s:g} s") from error
        return self._store.get(key)

    def peek(self, key: str) -> bytes | None:
        """Return `key` if somebody has set it."""
        return self._store.get(key) if self._store.check([key]) else None

    def delete(self, key: str) -> None:
        """Remove `key`, if it is there."""
        self._store.delete_key(key)

    def set_first(self, key: str, value: bytes) -> bytes:
        """Set `key` unless it is set already; return what it holds now."""
        self._store.compare_set(key, "", value.decode())
        return self._store.get(key)

    def set_json(self, key: str, value: Any) -> None:
        """Write `value` as JSON."""
        self.set(key, json.dumps(value).encode())

    def get_json(self, key: str, *, timeout_s: float) -> Any:
        """Wait for `key` and parse it."""
        return json.loads(self.get(key, timeout_s=timeout_s))

    def barrier(self, name: str, *, rank: int, world_size: int, timeout_s: float) -> None:
        """Wait until all ranks have called this with one `name`.

        Raises TimeoutError that lists the ranks that did not come.
        """
        self.set(f"barrier/{name}/{rank}", b"1")
        deadline = time.monotonic() + timeout_s
        for other in range(world_size):
            left = max(deadline - time.monotonic(), 0.01)
            try:
                self.get(f"barrier/{name}/{other}", timeout_s=left)
            except TimeoutError:
                keys = [f"barrier/{name}/{r}" for r in range(world_size)]
                missing = [r for r, key in enumerate(keys) if not self._store.check([key])]
                raise TimeoutError(
                    f"ranks {missing} did not reach {name!r} within {timeout_s:g} s"
                ) from None
