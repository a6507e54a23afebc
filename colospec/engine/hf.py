"""The transformers engine: any decoder-only causal language model, on a CPU or a GPU.

It runs the model's body only: no head, no KV cache. Hooks copy each wanted layer's output straight
into the views. Documents are packed into one forward pass by our own attention function; because a
model may do something that this function does not know, the engine compares both ways on a random
prompt at start-up, and runs such a model one document at a time with its stock attention instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from colospec.batch import Cursor, Features, TokenBatch
from colospec.engine.base import EngineSettings
from colospec.engine.packed import NAME, Borders, UnsupportedAttentionError, documents
from colospec.engine.pretrained import load_body

log = logging.getLogger(__name__)

PROBE_LENGTHS = (11, 1, 23)
MAX_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
# Their frequencies depend on the longest sequence of a batch, so packing would change them.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class HfEngine:
    """Runs the target through transformers; see `colospec.engine.base.Engine`.

    Raises ValueError where engine.tp is not 1 or the target cannot be loaded.
    """

    def __init__(self, settings: EngineSettings) -> None:
        if settings.config.tp != 1:
            raise ValueError(
                f"engine.tp={settings.config.tp}: engine=hf runs the whole target on one device; "
                "set engine.tp=1 or engine=sglang"
            )
        self.spec = settings.spec
        self._device = torch.device(settings.device)
        self._max_tokens = settings.max_tokens
        self._max_sequences = settings.max_sequences
        self._body: nn.Module | None = load_body(
            settings.target,
            dtype=settings.spec.dtype,
            weights=settings.weights,
            trust_remote_code=settings.trust_remote_code,
            device=self._device,
        )
        self._rows = slice(0, 0)
        self._out: Features | None = None
        self._hook(self._body)
        self._is_packed = self._choose_attention(settings.target.vocab_size)

    def capture(self, tokens: TokenBatch, out: Features | None) -> None:
        """Fill `out` with the target's hidden states; see `colospec.engine.base.Engine`."""
        if self._body is None:
            raise RuntimeError("the engine is closed")
        if tokens.num_tokens > self._max_tokens or tokens.num_sequences > self._max_sequences:
            raise ValueError(
                f"micro-batch at {tokens.cursor} has {tokens.num_tokens} tokens in "
                f"{tokens.num_sequences} documents, but the engine was started for at most "
                f"{self._max_tokens} in {self._max_sequences}; raise data.token_budget or "
                "data.max_sequences"
            )
        if out is None or tokens.num_tokens == 0:
            return
        self._out = out
        try:
            if self._is_packed:
                self._run_packed(tokens)
            else:
                self._run_one_by_one(tokens)
        finally:
            self._out = None

    def close(self) -> None:
        """Drop the model."""
        self._body = None

    def _hook(self, body: nn.Module) -> None:
        layers = decoder_layers(body, self.spec.hidden_size)
        for index, layer_id in enumerate(self.spec.aux_layer_ids):
            layers[layer_id].register_forward_hook(self._copier(index))

    def _copier(self, index: int) -> Any:
        first = index * self.spec.hidden_size
        columns = slice(first, first + self.spec.hidden_size)

        def copy(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            assert self._out is not None
            self._out.aux_hidden_states[self._rows, columns].copy_(hidden[0])

        return copy

    def _run(self, token_ids: Tensor, position_ids: Tensor, rows: slice) -> None:
        assert self._out is not None
        assert self._body is not None
        self._rows = rows
        with torch.inference_mode():
            output = self._body(
                input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False
            )
            if self._out.last_hidden_states is not None:
                self._out.last_hidden_states[rows].copy_(output.last_hidden_state[0])

    def _run_packed(self, tokens: TokenBatch) -> Borders:
        # An empty document has no row, and flash attention needs none.
        lengths = tuple(length for length in tokens.cu_seqlens.diff().tolist() if length)
        borders = Borders(lengths, self._to_device(tokens.cu_seqlens))
        with documents(borders):
            self._run(
                self._to_device(tokens.token_ids),
                self._to_device(tokens.position_ids),
                slice(0, tokens.num_tokens),
            )
        return borders

    def _run_one_by_one(self, tokens: TokenBatch) -> None:
        token_ids = self._to_device(tokens.token_ids)
        position_ids = self._to_device(tokens.position_ids)
        for first, last in _spans(tokens):
            self._run(token_ids[first:last], position_ids[first:last], slice(first, last))

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            # From pageable memory the host would wait for the copy.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _choose_attention(self, vocab_size: int) -> bool:
        """Switch to packed attention if it gives what the stock one gives; tell whether it does."""
        probe = _probe(vocab_size)
        expected, actual = (
            Features.empty(self.spec, probe.num_tokens, self._device) for _ in range(2)
        )
        self._out = expected
        self._run_one_by_one(probe)
        config: Any = getattr(self._body, "config", None)
        stock = config._attn_implementation
        reason = self._try_packed(probe, expected, actual)
        if reason is None:
            return True
        config._attn_implementation = stock
        log.warning(
            "engine hf: one document at a time with %s attention, because %s", stock, reason
        )
        return False

    def _try_packed(self, probe: TokenBatch, expected: Features, actual: Features) -> str | None:
        """Return why the model cannot run packed, or None."""
        body: Any = self._body
        if found := _rope_types(body.config.to_dict()) & BATCH_DEPENDENT_ROPE:
            return f"its rotary embedding ({', '.join(sorted(found))}) depends on the whole batch"
        self._out = actual
        try:
            body.set_attn_implementation(NAME)
            borders = self._run_packed(probe)
        except (UnsupportedAttentionError, ValueError, NotImplementedError) as error:
            return str(error)
        finally:
            self._out = None
        num_layers = len(decoder_layers(body, self.spec.hidden_size))
        if borders.num_calls != num_layers:
            return f"{num_layers - borders.num_calls} of its {num_layers} layers do not use it"
        worst = max(_errors(actual, expected))
        if not worst <= MAX_ERROR[self.spec.dtype]:
            return f"a packed prompt differs from the same prompt alone by {worst:.2g} (relative)"
        return None


def decoder_layers(body: nn.Module, hidden_size: int) -> nn.ModuleList:
    """Return the list of decoder layers of a transformers decoder.

    Raises ValueError where it cannot be told which list that is.
    """
    config: Any = body.config
    lists = [
        module
        for module in body.children()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if len(lists) != 1 or config.hidden_size != hidden_size:
        raise ValueError(
            f"engine=hf cannot find the {config.num_hidden_layers} decoder layers of "
            f"{type(body).__name__}; set engine=sglang if it serves this model"
        )
    return lists[0]


def _spans(tokens: TokenBatch) -> Iterator[tuple[int, int]]:
    borders = tokens.cu_seqlens.tolist()
    return ((a, b) for a, b in pairwise(borders) if b > a)


def _probe(vocab_size: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocab_size, (n,), generator=generator) for n in PROBE_LENGTHS]
    masks = [torch.ones(n, dtype=torch.bool) for n in PROBE_LENGTHS]
    return TokenBatch.pack(Cursor(0, 0, 0), range(len(texts)), texts, masks)


def _errors(actual: Features, expected: Features) -> Iterator[float]:
    """Yield |actual - expected| / |expected| of each document's rows, for each feature tensor."""
    pairs = [(actual.aux_hidden_states, expected.aux_hidden_states)]
    if actual.last_hidden_states is not None and expected.last_hidden_states is not None:
        pairs.append((actual.last_hidden_states, expected.last_hidden_states))
    for a, b in pairs:
        documents_of = (torch.split(x.double(), list(PROBE_LENGTHS)) for x in (a, b))
        for x, y in zip(*documents_of, strict=True):
            yield float((x - y).norm() / y.norm().clamp(min=1e-30))


def _rope_types(config: Any) -> set[str]:
    """Collect every rope_type in a nested config."""
    if not isinstance(config, dict):
        return set()
    found = {config[key] for key in ("rope_type", "type") if isinstance(config.get(key), str)}
    return found.union(*(_rope_types(value) for value in config.values()))
