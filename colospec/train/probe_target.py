"""The target as trainer 0 sees it in a probe: features of any text, from the engine beside it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from colospec.batch import Features, FeatureSource, FeatureSpec, TokenBatch
from colospec.engine.base import Engine
from colospec.train.produce import check_lease
from colospec.train.requests import Requests
from colospec.world import World


class ProbeTarget(Protocol):
    """Captures texts that no plan knows. `capture` any number of times, then `finish`."""

    def capture(self, token_ids: Tensor) -> Features:
        """Return the features of token_ids [N], last hidden states included, to be kept."""
        ...

    def finish(self, *, goes_on: bool) -> None:
        """End a probe, or say at any time that training does not go on."""
        ...


class RingTarget:
    """In colocate mode: asks the engine through the job's store, reads the ring."""

    def __init__(self, world: World, source: FeatureSource, spec: FeatureSpec) -> None:
        self._world, self._source, self._spec = world, source, spec
        self._requests = Requests(world.store)

    def capture(self, token_ids: Tensor) -> Features:
        """See `ProbeTarget`; the other end is `produce.serve_probe`."""
        tokens = self._requests.ask(token_ids)
        features = self._read(tokens)
        last = features.last_hidden_states
        if last is None:
            last = self._read(tokens).aux_hidden_states[:, : self._spec.hidden_size]
        # All ranks of the replica took part, so all have read the request.
        self._requests.forget(tokens)
        self._world.watchdog.beat()
        return Features(features.aux_hidden_states, last)

    def finish(self, *, goes_on: bool) -> None:
        """See `ProbeTarget`."""
        self._requests.finish(goes_on=goes_on)

    def _read(self, tokens: TokenBatch) -> Features:
        lease = self._source.acquire(timeout_s=self._world.limit.step_s)
        if lease is None:
            raise RuntimeError("the engine ended in the middle of a probe")
        with lease:
            check_lease(lease, tokens)
            aux, last = lease.features.aux_hidden_states, lease.features.last_hidden_states
            device = self._world.device
            copies = [x.to(device, copy=True) for x in (aux, last) if x is not None]
        return Features(copies[0], copies[1] if last is not None else None)


class LocalTarget:
    """In alternate mode: the engine is in this process."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device

    def capture(self, token_ids: Tensor) -> Features:
        """See `ProbeTarget`."""
        spec, number = self._engine.spec, len(token_ids)
        aux, last = (
            torch.empty(number, width, dtype=spec.dtype, device=self._device)
            for width in (len(spec.aux_layer_ids) * spec.hidden_size, spec.hidden_size)
        )
        features = Features(aux, last)
        self._engine.capture(Requests.batch(token_ids.tolist(), 0), features)
        return features

    def finish(self, *, goes_on: bool) -> None:
        """Nobody waits."""
