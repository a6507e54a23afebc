"""The SGLang engine: an in-process ModelRunner that prefills packed documents.

One process per rank, no server, no scheduler, no tokenizer. Only the model's body runs: embedding,
layers and final norm, never the vocabulary head. Hooks add hidden state and residual of each wanted
layer straight into the views. The KV pool is scratch, sized for one forward pass.

SGLang's state is global, so a process can start this engine once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colospec.batch import Features, TokenBatch
from colospec.config import EngineCheck, Weights
from colospec.engine.base import EngineSettings
from colospec.engine.sglang_args import forward_rows, longest_document
from colospec.engine.sglang_batch import BatchBuilder
from colospec.engine.sglang_check import check_layers, check_room, check_transformers
from colospec.engine.sglang_imports import prepare
from colospec.engine.sglang_install import check_installation
from colospec.engine.sglang_runner import check_target, check_world, free_memory, start_runner

log = logging.getLogger(__name__)

# Where SGLang's models keep their decoder.
BODIES = ("model", "language_model.model", "model.language_model", "language_model")


class SglangEngine:
    """Runs the target through SGLang; see `colospec.engine.base.Engine`.

    With engine.tp > 1 all ranks of the replica call everything alike, `capture` with the same
    tokens. Raises ValueError for targets and settings that SGLang cannot serve, RuntimeError for an
    installation that is not one of ours, for a GPU without room, and where the captured states are
    not what they should be.
    """

    def __init__(self, settings: EngineSettings) -> None:
        _check_settings(settings)
        check_target(settings.target)
        check_world(settings.config.tp)
        version = check_installation()
        prepare(settings.device.type)
        self.spec = settings.spec
        self.settings = settings
        owns_group = not dist.is_initialized()
        self._runner: Any = start_runner(settings)
        self._owns_group = owns_group
        self.attention_backend: str = self._runner.server_args.attention_backend
        self.body, self.layers = find_body(self._runner.model, settings.target.num_layers)
        if not settings.target.tied:
            # A tied head is the embedding.
            self._runner.model.lm_head = None
        self._forward_tokens = settings.config.forward_tokens or settings.max_tokens
        self._builder = BatchBuilder(self._runner, max_tokens=forward_rows(settings))
        self._contexts: Any = importlib.import_module("sglang.srt.model_executor.forward_context")
        self._aux: Tensor | None = None
        self._hook()
        check_room(self)
        check_layers(self)
        if settings.config.check is EngineCheck.transformers:
            check_transformers(self)
        log.info(
            "engine sglang: SGLang %s, tp=%d, %s attention, KV pool of %d tokens",
            version,
            settings.config.tp,
            self.attention_backend,
            self._runner.max_total_num_tokens,
        )

    def capture(self, tokens: TokenBatch, out: Features | None) -> None:
        """Fill `out` with the target's hidden states; see `colospec.engine.base.Engine`."""
        if self._runner is None:
            raise RuntimeError("the engine is closed")
        settings = self.settings
        if tokens.num_tokens > settings.max_tokens or tokens.num_sequences > settings.max_sequences:
            raise ValueError(
                f"micro-batch at {tokens.cursor} has {tokens.num_tokens} tokens in "
                f"{tokens.num_sequences} documents, but the engine was started for at most "
                f"{settings.max_tokens} in {settings.max_sequences}; raise data.token_budget or "
                "data.max_sequences"
            )
        lengths = tokens.cu_seqlens.diff().tolist()
        if max(lengths, default=0) > longest_document(settings):
            raise ValueError(
                f"micro-batch at {tokens.cursor} has a document of {max(lengths)} tokens, but the "
                f"engine was started for at most {longest_document(settings)}; raise "
                "data.max_length"
            )
        for rows, parts in _forwards(lengths, self._forward_tokens):
            self._forward(tokens, rows, parts, out)

    def close(self) -> None:
        """Let go of the model and its pools."""
        if self._runner is None:
            return
        free_memory(self._runner)
        self._runner = None
        self._builder = None  # type: ignore[assignment]
        self.body = None  # type: ignore[assignment]
        self.layers = None  # type: ignore[assignment]
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self._owns_group = False

    def _forward(
        self, tokens: TokenBatch, rows: slice, lengths: list[int], out: Features | None
    ) -> None:
        batch = self._builder.build(tokens.token_ids[rows], tokens.position_ids[rows], lengths)
        attention = self._runner.attn_backend
        context = self._contexts.ForwardContext(attn_backend=attention)
        self._aux = None if out is None else out.aux_hidden_states[rows]
        try:
            with torch.no_grad(), self._contexts.forward_context(context):
                attention.init_forward_metadata(batch)
                result = self.body(batch.input_ids, batch.positions, batch)
                if out is not None and out.last_hidden_states is not None:
                    last = result if isinstance(result, Tensor) else result[0]
                    out.last_hidden_states[rows].copy_(last)
        finally:
            self._aux = None

    def _hook(self) -> None:
        for index, layer_id in enumerate(self.spec.aux_layer_ids):
            self.layers[layer_id].register_forward_hook(self._adder(index))

    def _adder(self, index: int) -> Any:
        width = self.spec.hidden_size
        columns = slice(index * width, (index + 1) * width)

        def add(_module: nn.Module, _args: object, output: Any) -> None:
            if self._aux is not None:
                write_state(output, self._aux[:, columns])

        return add


def write_state(output: Any, view: Tensor) -> None:
    """Write what a layer puts out, hidden state plus residual if there is one, into `view`."""
    if isinstance(output, Tensor):
        view.copy_(output)
        return
    hidden, *rest = output
    if rest and isinstance(rest[0], Tensor) and rest[0].shape == hidden.shape:
        torch.add(hidden, rest[0], out=view)
    else:
        view.copy_(hidden)


def find_body(model: nn.Module, num_layers: int) -> tuple[nn.Module, nn.ModuleList]:
    """Return the decoder of one of SGLang's models, and its layers.

    Raises ValueError where it cannot be told which module that is.
    """
    for path in BODIES:
        body: Any = model
        for name in path.split("."):
            body = getattr(body, name, None)
        layers = getattr(body, "layers", None)
        has_norm = isinstance(getattr(body, "norm", None), nn.Module)
        if has_norm and isinstance(layers, nn.ModuleList) and len(layers) == num_layers:
            return body, layers
    raise ValueError(
        f"engine=sglang cannot find the {num_layers} decoder layers of {type(model).__name__}; "
        "set engine=hf"
    )


def _check_settings(settings: EngineSettings) -> None:
    check = settings.config.check
    if check is EngineCheck.transformers and settings.weights is Weights.random:
        raise ValueError(
            "engine.check=transformers compares two copies of the target, and with "
            "target.weights=random they would have different weights; set engine.check=layers"
        )


def _forwards(lengths: Sequence[int], limit: int) -> Iterator[tuple[slice, list[int]]]:
    """Split documents of these lengths into parts of at most `limit` tokens.

    Yields the rows of each part and its documents' lengths; empty documents have no row. A longer
    document is a part of its own.
    """
    first = end = 0
    part: list[int] = []
    for length in lengths:
        if part and end - first + length > limit:
            yield slice(first, end), part
            first, part = end, []
        if length:
            part.append(length)
            end += length
    if part:
        yield slice(first, end), part
