"""A target made of an engine's captures decodes as the target itself does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colospec.batch import Cursor, Features, FeatureSpec, TokenBatch
from colospec.config import EngineConfig, Weights
from colospec.draft.base import DraftModel
from colospec.engine.base import Engine, open_engine
from colospec.evaluate.acceptance import DecodingSettings, decode_speculatively
from colospec.evaluate.captured import CapturedDecoder
from tests.evaluate.models import CPU, Untrained, random_prompts

MOST = 64


@pytest.fixture
def captured(untrained: Untrained) -> CapturedDecoder:
    target, layers = untrained.target, untrained.drafter.aux_layer_ids
    head = DraftModel()
    head.load_target(target)
    # As a draft that asks for no last hidden states would have it.
    engine = open_engine(
        EngineConfig(name="hf"), target,
        FeatureSpec(layers, False, target.hidden_size, target.dtype),
        weights=Weights.pretrained, trust_remote_code=False, device=CPU,
        max_tokens=MOST, max_sequences=1,
    )  # fmt: skip
    return CapturedDecoder(
        lambda ids: capture(engine, ids), head.frozen_head, target=target, aux_layer_ids=layers
    )


def capture(engine: Engine, token_ids: Tensor) -> Features:
    spec, number = engine.spec, len(token_ids)
    views = Features(
        torch.empty(number, len(spec.aux_layer_ids) * spec.hidden_size, dtype=spec.dtype),
        torch.empty(number, spec.hidden_size, dtype=spec.dtype),
    )
    mask = torch.ones(number, dtype=torch.bool)
    engine.capture(TokenBatch.pack(Cursor(0, 0, 0), (0,), [token_ids], [mask]), views)
    return views


def test_logits_and_states_are_those_of_the_target_also_after_a_truncation(
    untrained: Untrained, captured: CapturedDecoder, random_seed: int
) -> None:
    generator = torch.Generator().manual_seed(random_seed)
    for decoder in (untrained.decoder, captured):
        decoder.start(untrained.drafter.aux_layer_ids)
    length = 0
    for kept in (3, 0, 5, 1):
        ids = torch.randint(untrained.target.vocab_size, (6,), generator=generator)
        expected, actual = untrained.decoder.forward(ids), captured.forward(ids)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        length += kept
        for decoder in (untrained.decoder, captured):
            decoder.truncate(length)
    assert captured.num_forwards == 4


def test_speculative_decoding_gives_the_same_texts_and_steps(
    untrained: Untrained, captured: CapturedDecoder, random_seed: int
) -> None:
    prompts = random_prompts(3, vocab_size=untrained.target.vocab_size, seed=random_seed)
    settings = DecodingSettings(max_new_tokens=20, chain_length=3)
    one, other = (
        decode_speculatively(decoder, untrained.drafter, prompts, settings)
        for decoder in (captured, untrained.decoder)
    )
    assert one.outputs == other.outputs
    assert one.num_reached == other.num_reached
