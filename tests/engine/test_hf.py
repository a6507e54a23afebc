"""The transformers engine against transformers itself."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from colospec.batch import FeatureSpec, TokenBatch
from colospec.config import EngineConfig, Weights
from colospec.engine.base import Engine, open_engine
from colospec.target import Target
from tests.engine import targets
from tests.engine.conformance import capture, check_engine, random_batch

CPU = torch.device("cpu")
AUX = (3, 0, 4)


def start(
    path: Path,
    *,
    aux: tuple[int, ...] = AUX,
    last: bool = True,
    weights: Weights = Weights.pretrained,
    max_tokens: int = 256,
) -> Engine:
    target = Target.load(path)
    return open_engine(
        EngineConfig(name="hf"),
        target,
        FeatureSpec(aux, last, target.hidden_size, target.dtype),
        weights=weights,
        trust_remote_code=False,
        device=CPU,
        max_tokens=max_tokens,
        max_sequences=8,
    )


def oracle(path: Path, tokens: TokenBatch, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return aux states, post-norm states and logits, document by document, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )
    # The last entry of output_hidden_states is after the final norm, so layer L - 1 needs a hook.
    states: dict[int, torch.Tensor] = {}
    for layer in AUX:
        model.model.layers[layer].register_forward_hook(
            lambda _module, _args, out, layer=layer: states.__setitem__(layer, out)
        )
    aux, last, logits = [], [], []
    borders = tokens.cu_seqlens.tolist()
    for first, end in pairwise(borders):
        with torch.no_grad():
            out = model(tokens.token_ids[None, first:end], output_hidden_states=True)
        for layer in set(AUX) - {targets.LAYERS - 1}:
            assert torch.equal(out.hidden_states[layer + 1], states[layer])
        aux.append(torch.cat([states[layer][0] for layer in AUX], dim=-1))
        last.append(out.hidden_states[-1][0])
        logits.append(out.logits[0])
    return torch.cat(aux), torch.cat(last), torch.cat(logits)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare row by row, by norm."""
    error = (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(
        dim=-1
    ).clamp(min=1e-9)
    assert error.max() < tolerance


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("Llama", {"head_dim": 20, "attention_bias": True}),
    ("Qwen3", {"head_dim": 32}),
    ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("Qwen2", {}),
    ("Mistral", {"sliding_window": None}),
    ("Mistral", {"sliding_window": 4}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_capture_equals_transformers_layer_outputs(
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    random_seed: int,
) -> None:
    path = targets.save(tmp_path, family, seed=random_seed, **changes)
    tokens = random_batch([7, 1, 13, 20], vocab_size=targets.VOCAB_SIZE, seed=random_seed)
    engine = start(path)

    out = capture(engine, tokens, CPU)

    aux, last, logits = oracle(path, tokens, torch.float64)
    assert_near(out.aux_hidden_states, aux, 1e-4)
    assert out.last_hidden_states is not None
    assert_near(out.last_hidden_states, last, 1e-4)
    head = Target.load(path).load_head()
    assert_near(out.last_hidden_states @ head.T, logits, 1e-4)
    assert not caplog.records


def test_bfloat16_capture_is_near_float64(tmp_path: Path, random_seed: int) -> None:
    path = targets.save(tmp_path, "Qwen3", dtype=torch.bfloat16, head_dim=32, seed=random_seed)
    tokens = random_batch([9, 30, 4], vocab_size=targets.VOCAB_SIZE, seed=random_seed)

    out = capture(start(path), tokens, CPU)

    aux, last, _ = oracle(path, tokens, torch.float64)
    assert out.aux_hidden_states.dtype == torch.bfloat16
    assert out.last_hidden_states is not None
    for actual, expected in ((out.aux_hidden_states, aux), (out.last_hidden_states, last)):
        assert_near(actual, expected, 0.05)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
@pytest.mark.parametrize("last", [True, False])
def test_hf_engine_conforms(tmp_path: Path, family: str, last: bool, random_seed: int) -> None:
    path = targets.save(tmp_path, family, head_dim=16, seed=random_seed)
    engine = start(path, last=last, max_tokens=200)

    check_engine(
        engine,
        device=CPU,
        vocab_size=targets.VOCAB_SIZE,
        longest=200,
        seed=random_seed,
        close=lambda actual, expected: assert_near(actual, expected, 1e-4),
    )


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Gemma2", {"head_dim": 16}, "softcap"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
    ],
)
def test_models_that_cannot_be_packed_run_one_by_one_and_say_why(
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    random_seed: int,
) -> None:
    path = targets.save(tmp_path, family, seed=random_seed, **changes)
    tokens = random_batch([8, 15], vocab_size=targets.VOCAB_SIZE, seed=random_seed)

    with caplog.at_level(logging.WARNING, logger="colospec"):
        out = capture(start(path), tokens, CPU)

    (record,) = caplog.records
    assert "one document at a time" in record.getMessage()
    assert reason in record.getMessage()
    aux, last, _ = oracle(path, tokens, torch.float64)
    assert_near(out.aux_hidden_states, aux, 1e-4)
    assert out.last_hidden_states is not None
    assert_near(out.last_hidden_states, last, 1e-4)


def test_capture_writes_into_views_of_a_larger_buffer(tmp_path: Path, random_seed: int) -> None:
    engine = start(targets.save(tmp_path, "Llama", seed=random_seed), last=False)
    tokens = random_batch([4, 6], vocab_size=targets.VOCAB_SIZE, seed=random_seed)
    expected = capture(engine, tokens, CPU).aux_hidden_states
    buffer = torch.full((30, expected.shape[1]), -1.0)

    engine.capture(tokens, type(capture(engine, tokens, CPU))(buffer[10:20], None))

    assert torch.equal(buffer[10:20], expected)
    assert (buffer[:10] == -1).all()
    assert (buffer[20:] == -1).all()


def test_random_weights_need_only_the_config_and_are_the_same_everywhere(tmp_path: Path) -> None:
    path = targets.save(tmp_path / "full", "Qwen3")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((path / "config.json").read_text())
    tokens = random_batch([6, 3], vocab_size=targets.VOCAB_SIZE, seed=1)

    state = torch.random.get_rng_state()
    first = capture(start(bare, weights=Weights.random), tokens, CPU)
    torch.manual_seed(123)
    second = capture(start(bare, weights=Weights.random), tokens, CPU)

    assert torch.equal(first.aux_hidden_states, second.aux_hidden_states)
    torch.random.set_rng_state(state)


def test_micro_batch_above_the_limits_is_refused(tmp_path: Path) -> None:
    engine = start(targets.save(tmp_path, "Llama"), max_tokens=16)
    tokens = random_batch([17], vocab_size=targets.VOCAB_SIZE, seed=0)

    with pytest.raises(ValueError, match=r"17 tokens.*at most 16.*data\.token_budget"):
        capture(engine, tokens, CPU)


def test_closed_engine_says_so(tmp_path: Path) -> None:
    engine = start(targets.save(tmp_path, "Llama"))
    engine.close()
    engine.close()

    with pytest.raises(RuntimeError, match="closed"):
        capture(engine, random_batch([3], vocab_size=targets.VOCAB_SIZE, seed=0), CPU)


def test_missing_weights_name_the_directory(tmp_path: Path) -> None:
    path = targets.save(tmp_path, "Llama")
    (path / "model.safetensors").unlink()

    with pytest.raises(ValueError, match=r"cannot load the target .*model\.safetensors"):
        start(path)


def test_unknown_architecture_mentions_remote_code(tmp_path: Path) -> None:
    path = targets.save(tmp_path, "Llama")
    config = json.loads((path / "config.json").read_text()) | {"model_type": "unheard_of"}
    (path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=r"target\.trust_remote_code=true"):
        start(path)
