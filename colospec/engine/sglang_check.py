"""The engine proves at start that it captures what it should, on a fixed random prompt.

`check_room` runs the largest forward pass, so that a lack of memory shows now and not in an hour.
`check_layers` compares each captured layer with what the module behind that layer receives, the
last hidden states with what the final norm puts out, and packed documents with documents alone.
`check_transformers` compares all of it with a second copy of the model in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from colospec.batch import Cursor, Features, TokenBatch
from colospec.config import EngineConfig
from colospec.engine.base import EngineSettings
from colospec.engine.sglang_args import longest_document

if TYPE_CHECKING:
    from colospec.engine.sglang import SglangEngine

PROBE_LENGTHS = (61, 1, 127, 18, 2)
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


def check_room(engine: SglangEngine) -> None:
    """Raise RuntimeError where the GPU has no memory for the largest micro-batch."""
    settings = engine.settings
    if settings.device.type != "cuda":
        return
    number, longest = settings.max_sequences, longest_document(settings)
    tokens = torch.zeros(min(settings.max_tokens, number * longest), dtype=torch.int64)
    try:
        engine.capture(_pack(list(torch.split(tokens, longest))), None)
        torch.cuda.synchronize(settings.device)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"a micro-batch of {len(tokens)} tokens does not fit the engine's share of "
            f"{settings.device} ({error}); set engine.forward_tokens, lower data.token_budget, or "
            "raise memory.engine_fraction or engine.tp"
        ) from error


def check_layers(engine: SglangEngine) -> None:
    """Raise RuntimeError, naming the layer, unless the captured states are what they should be."""
    tokens = probe(engine.settings)
    with _witnesses(engine) as seen:
        packed = _capture(engine, tokens)
    for name, columns in _columns(engine):
        expected = torch.cat(seen[name])
        _compare(engine, f"{name} captured", "what follows it receives", columns(packed), expected)
    for first, last in pairwise(tokens.cu_seqlens.tolist()):
        alone = _capture(engine, _pack([tokens.token_ids[first:last]]))
        for name, columns in _columns(engine):
            what = f"{name} of {last - first} packed tokens"
            _compare(
                engine, what, "the document alone", columns(packed)[first:last], columns(alone)
            )


def check_transformers(engine: SglangEngine) -> None:
    """Raise RuntimeError, naming the layer, unless transformers makes the same states."""
    from colospec.engine.hf import HfEngine

    settings = engine.settings
    tokens = probe(settings)
    ours = _capture(engine, tokens)
    other = HfEngine(replace(settings, config=EngineConfig(name="hf")))
    theirs = _empty(settings, tokens.num_tokens)
    other.capture(tokens, theirs)
    other.close()
    del other
    for name, columns in _columns(engine):
        _compare(engine, f"{name} in SGLang", "transformers", columns(ours), columns(theirs))
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()


def probe(settings: EngineSettings) -> TokenBatch:
    """Return a fixed prompt of a few random documents, within the engine's limits."""
    generator = torch.Generator().manual_seed(0)
    documents: list[Tensor] = []
    left = settings.max_tokens
    # The first document reaches past a sliding window, if there is one.
    window = settings.target.hf_config.get("sliding_window") or 0
    first, *others = PROBE_LENGTHS
    for length in (max(first, window and window + 64), *others)[: settings.max_sequences]:
        length = min(length, left, longest_document(settings))
        if length:
            vocab_size = settings.target.vocab_size
            documents.append(torch.randint(vocab_size, (length,), generator=generator))
            left -= length
    return _pack(documents)


def _pack(documents: list[Tensor]) -> TokenBatch:
    masks = [torch.ones(len(document), dtype=torch.bool) for document in documents]
    return TokenBatch.pack(Cursor(0, 0, 0), range(len(documents)), documents, masks)


def _empty(settings: EngineSettings, num_tokens: int) -> Features:
    features = Features.empty(settings.spec, num_tokens, settings.device)
    for tensor in features.tensors():
        tensor.fill_(torch.nan)
    return features


def _capture(engine: SglangEngine, tokens: TokenBatch) -> Features:
    out = _empty(engine.settings, tokens.num_tokens)
    engine.capture(tokens, out)
    return out


def _columns(engine: SglangEngine) -> Iterator[tuple[str, Any]]:
    """Yield a name and a getter for each layer's part of the features."""
    width = engine.spec.hidden_size
    for index, layer_id in enumerate(engine.spec.aux_layer_ids):
        columns = slice(index * width, (index + 1) * width)
        yield f"layer {layer_id}", lambda x, columns=columns: x.aux_hidden_states[:, columns]
    if engine.spec.last_hidden_states:
        yield "the final norm", lambda x: x.last_hidden_states


@contextmanager
def _witnesses(engine: SglangEngine) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the modules behind the captured layers receive while the body runs."""
    seen: dict[str, list[Tensor]] = {"the final norm": []}
    behind = [*engine.layers[1:], engine.body.norm]
    with ExitStack() as stack:
        for layer_id in engine.spec.aux_layer_ids:
            rows = seen[f"layer {layer_id}"] = []
            hook = _recorder(rows, engine.spec.hidden_size)
            handle = behind[layer_id].register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        norm: Any = engine.body.norm
        handle = norm.register_forward_hook(_output_recorder(seen["the final norm"]))
        stack.callback(handle.remove)
        yield seen


def _recorder(rows: list[Tensor], hidden_size: int) -> Any:
    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = [
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == hidden_size
        ]
        # A residual stream in two parts: hidden state and residual.
        rows.append(torch.stack([state.float() for state in states[:2]]).sum(0))

    return record


def _output_recorder(rows: list[Tensor]) -> Any:
    def record(_module: nn.Module, _args: object, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        rows.append(hidden.float())

    return record


def _compare(engine: SglangEngine, what: str, whom: str, actual: Tensor, expected: Tensor) -> None:
    expected = expected.double()
    error = float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    limit = MAX_ERROR.get(engine.spec.dtype, 0.05)
    if not error <= limit:
        backend = engine.attention_backend
        raise RuntimeError(
            f"engine=sglang: {what} and {whom} differ by {error:.3g} (relative; at most {limit:g}) "
            f"with attention_backend={backend}; try +engine.server_args.attention_backend=triton, "
            "or engine=hf"
        )
