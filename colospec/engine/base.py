"""What an engine is, and how one is chosen: `open_engine` is the only door.

An engine runs the frozen target and writes its hidden states straight into memory that somebody
else owns. Engines are registered by name; the factories import their engine only when it is chosen.
An engine of your own is a module that calls `register`; engine.module names it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch

from colospec.batch import Features, FeatureSpec, TokenBatch
from colospec.config import EngineConfig, Weights
from colospec.target import Target


class Engine(Protocol):
    """Runs the target over packed micro-batches.

    Call order, all from one thread: `capture` for every micro-batch, then `close`. The ranks of a
    tensor-parallel replica are one engine each; they make the same calls in the same order.
    """

    @property
    def spec(self) -> FeatureSpec:
        """The features that `capture` writes."""
        ...

    def capture(self, tokens: TokenBatch, out: Features | None) -> None:
        """Fill every element of the views in `out`, [T, width] each, row t for token t.

        `tokens` lies on the CPU, `out` on the engine's device. No logits, no sampling, and the
        host never waits for the device: the views are full once the current stream gets there. An
        empty micro-batch is a no-op. Raises ValueError for a micro-batch above the engine's limits.

        With `out` None this rank only takes part in its replica's forward pass, of a micro-batch
        that another rank writes; an engine without tensor parallelism has nothing to do then.
        """
        ...

    def close(self) -> None:
        """Let go of the target's memory. Idempotent."""
        ...


@dataclass(frozen=True)
class EngineSettings:
    """What a factory gets: all that an engine needs to start.

    A micro-batch never has more than `max_tokens` tokens or `max_sequences` documents, and no
    document more than `max_length` tokens (None: than `max_tokens`).
    """

    config: EngineConfig
    target: Target
    spec: FeatureSpec
    weights: Weights
    trust_remote_code: bool
    device: torch.device
    max_tokens: int
    max_sequences: int
    max_length: int | None = None


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
    max_length: int | None = None,
) -> Engine:
    """Start the engine that `config` asks for; auto is sglang on CUDA and hf on a CPU.

    Raises ValueError for an engine that is not there or cannot serve these settings, for an
    engine.module that cannot be imported or registers nothing of that name, and for aux layers that
    the target does not have; RuntimeError where the engine's package is missing.
    """
    _check_spec(spec, target)
    if config.module is not None:
        _import(config.module)
    device = torch.device(device)
    name = config.name
    if name == "auto":
        name = "sglang" if device.type == "cuda" else "hf"
    if name not in _FACTORIES:
        raise ValueError(_unknown(name, config.module))
    return _FACTORIES[name](
        EngineSettings(
            config=config,
            target=target,
            spec=spec,
            weights=weights,
            trust_remote_code=trust_remote_code,
            device=device,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            max_length=max_length,
        )
    )


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"engine.module={module} cannot be imported ({type(error).__name__}: {error}); it must "
            "lie on PYTHONPATH and call colospec.engine.base.register when imported"
        ) from error


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


def _unknown(name: str, module: str | None) -> str:
    known = ", ".join(sorted(_FACTORIES))
    if module is not None:
        return (
            f"engine.module={module} registers no engine {name} (there are: {known}); set "
            f"engine.name to one of these, or let it call engine.base.register({name!r}, ...)"
        )
    return (
        f"engine.name={name} is not known (there are: {known}); set engine=hf, or name the module "
        "that registers it with engine.module=..."
    )


def _open_hf(settings: EngineSettings) -> Engine:
    from colospec.engine.hf import HfEngine

    return HfEngine(settings)


def _open_sglang(settings: EngineSettings) -> Engine:
    from colospec.engine.sglang import SglangEngine

    return SglangEngine(settings)


register("hf", _open_hf)
register("sglang", _open_sglang)
