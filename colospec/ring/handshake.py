"""How the two sides of a ring find each other, and refuse each other, through the job's store.

The engine sets `ring/<pair>/engine`; the trainer reads it, maps the memory that it names, and sets
`ring/<pair>/trainer`, also when it refuses, so that the engine need not wait for its deadline.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from colospec.ring.errors import Corrupt, PeerFailed, RingTimeout, SpecMismatch
from colospec.ring.memory import Process
from colospec.ring.spec import Agreement


class Store(Protocol):
    """The two operations of a key-value store that a handshake needs."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait for `key`. Raises TimeoutError."""
        ...


@dataclass(frozen=True)
class Offer:
    """What a side tells the other. An engine names its memory; a trainer may leave an `error`.

    Where slots lie on a GPU, `handles` are the CUDA IPC handles of the slots in hex, `pointers`
    their addresses in the engine's process, and the trainer answers whether it uses them
    (`uses_ipc`) or the payload file. `ring_id` is the engine's, repeated by the trainer: keys of an
    earlier ring are not mistaken.
    """

    process: Process
    agreement: Agreement
    ring_id: str = ""
    control_fd: int = -1
    payload_fd: int = -1
    handles: tuple[str, ...] = ()
    pointers: tuple[int, ...] = ()
    uses_ipc: bool = False
    error: str | None = None

    def to_bytes(self) -> bytes:
        """Write as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Offer:
        """Parse; raises Corrupt for anything that `to_bytes` cannot have written."""
        try:
            fields: dict[str, Any] = json.loads(raw)
            agreement = dict(fields["agreement"])
            tensors = tuple((str(n), str(d), int(w)) for n, d, w in agreement.pop("tensors"))
            error = fields["error"]
            return cls(
                process=Process.parse(fields["process"]),
                agreement=Agreement(tensors=tensors, **agreement),
                ring_id=str(fields["ring_id"]),
                control_fd=int(fields["control_fd"]),
                payload_fd=int(fields["payload_fd"]),
                handles=tuple(bytes.fromhex(handle).hex() for handle in fields["handles"]),
                pointers=tuple(int(pointer) for pointer in fields["pointers"]),
                uses_ipc=bool(fields["uses_ipc"]),
                error=None if error is None else str(error),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Corrupt(
                f"cannot read the other side's offer ({error!r}); "
                "do both ranks run one version of colospec?"
            ) from error


def key(pair: str, side: str) -> str:
    """Return the store's key for `side`, "engine" or "trainer", of ring `pair`."""
    return f"ring/{pair}/{side}"


def receive(store: Store, pair: str, side: str, *, timeout_s: float) -> Offer:
    """Wait for the offer of `side`. Raises RingTimeout naming it."""
    try:
        return Offer.from_bytes(store.get(key(pair, side), timeout_s=timeout_s))
    except TimeoutError as error:
        raise RingTimeout(
            f"the {side} of ring {pair} did not come to the handshake within {timeout_s:g} s; "
            "see its rank's log"
        ) from error


def compare(pair: str, *, engine: Agreement, trainer: Agreement) -> None:
    """Raise SpecMismatch that prints both sides unless they are equal."""
    if not (names := engine.differences(trainer)):
        return
    hint = "start both ranks with one configuration"
    if "gpu_uuid" in names or "boot_id" in names:
        hint = "both ranks of a ring must see one GPU of one host: check CUDA_VISIBLE_DEVICES"
    raise SpecMismatch(
        f"engine and trainer of ring {pair} differ in {', '.join(names)}; {hint}\n"
        f"  engine:  {engine}\n  trainer: {trainer}"
    )


def raise_stale(pair: str, offer: Offer, reply: Offer) -> None:
    """Raise RuntimeError if the trainer answers another offer than ours."""
    if reply.ring_id not in (offer.ring_id, ""):
        raise RuntimeError(
            f"the job's store holds a trainer's answer to an earlier ring {pair}; open each pair "
            "once per job, or give it another name"
        )


def raise_refusal(pair: str, reply: Offer) -> None:
    """Raise PeerFailed if the trainer could not attach."""
    if reply.error is not None:
        raise PeerFailed(f"the trainer of ring {pair} could not attach", reply.error)
