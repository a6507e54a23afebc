"""What an engine is, and how one is chosen: `open_engine` is the only door.

An engine runs the frozen target and writes its hidden states straight into memory that somebody
else owns. Engines are registered by name; the factories import their engine only when it is chosen.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import torch

from colospec.batch import Features, FeatureSpec, TokenBatch
from colospec.config import EngineConfig, Weights
from colospec.target import Target


class Engine(Protocol):
    """Runs the target over packed micro-batches.

    Call order, all from one thread: `capture` for every micro-batch, then `close`.
    """

    @property
    def spec(self) -> FeatureSpec:
        """The features that `capture` writes."""
        ...

    def capture(self, tokens: TokenBatch, out: Features) -> None:
        """Fill every element of the views in `out`, [T, width] each, row t for token t.

        `tokens` lies on the CPU, `out` on the engine's device. No logits, no sampling, and the
        host never waits for the device: the views are full once the current stream gets there. An
        empty micro-batch is a no-op. Raises ValueError for a micro-batch above the engine's limits.
        """
        ...

    def close(self) -> None:
        """Let go of the target's memory. Idempotent."""
        ...


@dataclass(frozen=True)
class EngineSettings:
    """What a factory gets: all that an engine needs to start.

    A micro-batch never has more than `max_tokens` tokens or `max_sequences` documents.
    """

    config: EngineConfig
    target: Target
    spec: FeatureSpec
    weights: Weights
    trust_remote_code: bool
    device: torch.device
    max_tokens: int
    max_sequences: int


class EngineFactory(Protocol):
    """Builds an engine; raises ValueError for settings that it cannot serve."""

    def __call__(self, settings: EngineSettings) -> Engine: ...


_FACTORIES: dict[str, EngineFactory] = {}


def register(name: str, factory: EngineFactory) -> None:
    """Make `factory` what engine=`name` stands for, in place of what it stood for before."""
    _FACTORIES[name] = factory


def open_engine(
    config: EngineConfig,
    target: Target,
    spec: FeatureSpec,
    *,
    weights: Weights,
    trust_remote_code: bool,
    device: torch.device,
    max_tokens: int,
    max_sequences: int,
) -> Engine:
    """Start the engine that `config` asks for; auto is sglang on CUDA where it is registered.

    Raises ValueError for an engine that is not there or cannot serve these settings, and for aux
    layers that the target does not have; RuntimeError where its package is missing.
    """
    _check_spec(spec, target)
    name = config.name
    if name == "auto":
        name = "sglang" if device.type == "cuda" and "sglang" in _FACTORIES else "hf"
    if name not in _FACTORIES:
        raise ValueError(_missing(name))
    return _FACTORIES[name](
        EngineSettings(
            config=config,
            target=target,
            spec=spec,
            weights=weights,
            trust_remote_code=trust_remote_code,
            device=torch.device(device),
            max_tokens=max_tokens,
            max_sequences=max_sequences,
        )
    )


def _check_spec(spec: FeatureSpec, target: Target) -> None:
    absent = [layer for layer in spec.aux_layer_ids if not 0 <= layer < target.num_layers]
    if absent:
        raise ValueError(
            f"aux layers {absent} do not exist in {target.path}, which has layers 0 to "
            f"{target.num_layers - 1}; set draft.aux_layer_ids=null or name others"
        )
    if spec.hidden_size != target.hidden_size:
        raise ValueError(
            f"the draft wants features of width {spec.hidden_size}, but {target.path} has "
            f"hidden_size={target.hidden_size}; it was made for another target"
        )


def _missing(name: str) -> str:
    known = ", ".join(sorted(_FACTORIES))
    asked = f"engine={name}"
    if name == "sglang" and importlib.util.find_spec("sglang") is None:
        return (
            f"{asked} needs the package sglang: pip install 'colospec[sglang]', or run the target "
            "through transformers with engine=hf"
        )
    return f"{asked} is not available here (there are: {known}); set engine=hf"


def _open_hf(settings: EngineSettings) -> Engine:
    from colospec.engine.hf import HfEngine

    return HfEngine(settings)


register("hf", _open_hf)
