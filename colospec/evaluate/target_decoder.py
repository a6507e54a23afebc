"""The target as a decoder of one sequence: logits, aux hidden states, and a cache that can shrink.

Plain and speculative decoding run through this same class, so that their speeds can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from colospec.config import Weights
from colospec.engine.hf import decoder_layers
from colospec.engine.pretrained import load_model
from colospec.evaluate.decoder import eos_token_ids
from colospec.target import Target


class TargetDecoder:
    """Runs the target over new tokens of one sequence, one call after the other.

    `num_forwards` counts the calls. Shape letters: n new tokens, V vocabulary, A aux layers, H
    hidden size.
    """

    def __init__(
        self, target: Target, *, device: torch.device, trust_remote_code: bool = False
    ) -> None:
        self.device = device
        self.vocab_size = target.vocab_size
        self.eos_token_ids = eos_token_ids(target)
        self.num_forwards = 0
        self._model = load_model(
            target,
            dtype=target.dtype,
            weights=Weights.pretrained,
            trust_remote_code=trust_remote_code,
            device=device,
        )
        self._layers = decoder_layers(self._model.get_decoder(), target.hidden_size)
        self._wanted: tuple[int, ...] = ()
        self._captured: dict[int, Tensor] = {}
        self._cache: Any = None
        for layer_id, layer in enumerate(self._layers):
            layer.register_forward_hook(self._recorder(layer_id))

    def start(self, aux_layer_ids: tuple[int, ...]) -> None:
        """Forget the last sequence; from now on return these layers' outputs."""
        self._wanted = aux_layer_ids
        # Without the config every layer keeps everything, also one with a sliding window (which
        # the mask still honours), so that the cache can always shrink.
        self._cache = DynamicCache()

    @torch.inference_mode()
    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append token_ids [n]; return logits [n, V] and aux hidden states [n, A * H]."""
        self.num_forwards += 1
        length = self._cache.get_seq_length()
        positions = torch.arange(length, length + len(token_ids), device=self.device)
        out = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            past_key_values=self._cache,
            use_cache=True,
        )
        captured = [self._captured.pop(layer_id) for layer_id in self._wanted]
        aux = torch.cat(captured, dim=-1) if captured else out.logits.new_empty(len(token_ids), 0)
        return out.logits[0], aux

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        surplus = self._cache.get_seq_length() - length
        if surplus:
            # Negative: how many to remove; the form that all versions of transformers 5 take.
            self._cache.crop(-surplus)

    def _recorder(self, layer_id: int) -> Callable[..., None]:
        def record(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if layer_id in self._wanted:
                hidden = output if isinstance(output, Tensor) else output[0]
                self._captured[layer_id] = hidden[0]

        return record
