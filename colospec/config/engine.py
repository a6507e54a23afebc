"""`engine.*`: what runs the target."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class EngineCheck(Enum):
    """How an engine proves at start that it captures what it should: layers compares with the
    outputs of the model's own layers, transformers also with a second copy of the model."""

    layers = "layers"
    transformers = "transformers"


@dataclass
class EngineConfig:
    name: str = "auto"
    """hf, sglang, or one that `module` registers; auto is sglang on CUDA and hf on a CPU."""
    module: str | None = None
    """Python module to import first: it registers an engine (colospec.engine.base.register)."""
    tp: int = 1
    """Tensor-parallel size of one engine replica; it divides the number of engine ranks."""
    forward_tokens: int | None = None
    """Most tokens in one forward pass of the target; longer micro-batches run in several, split
    between documents. Null runs a micro-batch at once."""
    check: EngineCheck = EngineCheck.layers
    server_args: dict[str, Any] = field(default_factory=dict)
    """Passed to SGLang's ServerArgs as they are: +engine.server_args.attention_backend=triton."""
