"""Exports in SGLang's own hands: its loader, its modules, its way to capture the target's layers.

SGLang's state is global, so one fresh process starts the engine on the CPU, loads every export, and
brings back what it saw. Only the attention kernel is a plain one of this file: SGLang's own need a
server around them.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from colospec.batch import FeatureSpec
from colospec.checkpoint.export import WEIGHTS, export_draft, load_draft
from colospec.config import DraftConfig, EngineConfig, Weights
from colospec.draft import registry
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.dspark.config import DSparkConfig, MarkovHeadType
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.kv_cache import KVCache
from colospec.engine.base import EngineSettings
from colospec.target import Target
from tests.engine import targets
from tests.engine.conformance import capture, random_batch
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None,
        reason="wants SGLang: pip install --no-deps -r constraints/sglang-cpu.txt",
    ),
]
CPU = torch.device("cpu")
LENGTH, BLOCK = 11, 5
# Not the first layers, in any format: a shift by one is seen.
AUX = [1, 2, 3]
DRAFTS: dict[str, DraftConfig] = {
    "eagle3": Eagle3Config(draft_vocab_size=30, aux_layer_ids=AUX),
    "eagle3.1": Eagle3Config(
        draft_vocab_size=None, aux_layer_ids=AUX, norm_output=True, fc_norm=True
    ),
    "dflash": DFlashConfig(num_layers=2, block_size=BLOCK, aux_layer_ids=AUX, mask_token_id=7),
    "dflash sliding": DFlashConfig(
        num_layers=2, block_size=BLOCK, aux_layer_ids=AUX, sliding_layers=[1], sliding_window=6
    ),
    **{
        f"dspark {kind.value}": DSparkConfig(
            num_layers=2,
            block_size=BLOCK,
            aux_layer_ids=AUX,
            markov_rank=8,
            markov_head_type=kind,
            confidence_head_with_markov=kind is not MarkovHeadType.gated,
        )
        for kind in MarkovHeadType
    },
}
CLASSES = {
    "eagle3": "LlamaForCausalLMEagle3",
    "dflash": "DFlashDraftModel",
    "dspark": "Qwen3DSparkModel",
}


@dataclass
class PlainAttention:
    """What stands behind a RadixAttention: one sequence, everything cached."""

    heads: int
    kv_heads: int
    window: int
    causal: bool

    def __post_init__(self) -> None:
        self.cache = KVCache()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, _batch: Any) -> Tensor:
        first, count = self.cache.length, len(query)
        shape = (count, self.kv_heads, -1)
        keys, values = self.cache.append(key.view(shape), value.view(shape))
        here = torch.arange(first, first + count)[:, None]
        seen = torch.arange(first + count)[None]
        mask = torch.ones(count, first + count, dtype=torch.bool)
        if self.causal:
            mask &= seen <= here
        if self.window >= 0:
            # SGLang says how many tokens to the left are seen, without the own one.
            mask &= seen >= here - self.window
        out = F.scaled_dot_product_attention(
            query.view(count, self.heads, -1).transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).reshape(count, -1)


def load_in_sglang(runner: Any, directory: Path) -> tuple[Any, list[str]]:
    """Load a draft as a server would; return the model and the parameters that got no weight."""
    configs: Any = importlib.import_module("sglang.srt.configs.model_config")
    devices: Any = importlib.import_module("sglang.srt.configs.device_config")
    loaders: Any = importlib.import_module("sglang.srt.model_loader")
    model_config = configs.ModelConfig.from_server_args(
        runner.server_args, model_path=str(directory), is_draft_model=True
    )
    model = loaders.get_model(
        model_config=model_config,
        load_config=runner.load_config,
        device_config=devices.DeviceConfig("cpu"),
    )
    named = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in named.values():
            parameter.fill_(float("nan"))
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    rows = getattr(model.config, "draft_vocab_size", None)
    # The head is padded to a multiple of 64 rows.
    return model, [n for n, p in named.items() if p[:rows].isnan().any() or p.dim() == 0]


def use_plain_attention(model: Any) -> None:
    kinds: Any = importlib.import_module("sglang.srt.layers.radix_attention")
    for module in model.modules():
        inner = getattr(module, "attn", None)
        if isinstance(inner, kinds.RadixAttention):
            causal = inner.attn_type != kinds.AttentionType.ENCODER_ONLY
            module._modules.pop("attn")
            module.attn = PlainAttention(
                inner.tp_q_head_num, inner.tp_k_head_num, inner.sliding_window_size, causal
            )


@torch.no_grad()
def compare_chain(model: Any, draft: Any, aux: Tensor, token_ids: Tensor) -> dict[str, float]:
    """Draft behind a prompt, and one token more from the draft's own state, in both."""
    cache, errors = KVCache(), {}
    hidden, theirs = draft.project(aux), aux
    positions = torch.arange(LENGTH)
    vocab = len(draft.lm_head.weight)
    for step, rows in enumerate((positions, torch.tensor([LENGTH]))):
        ids = token_ids[: len(rows)]
        logits, hidden = draft.decode(ids, hidden, rows, cache)
        batch = SimpleNamespace(spec_info=SimpleNamespace(hidden_states=theirs))
        out, (state,) = model.model(
            ids, rows, batch, input_embeds=F.embedding(ids, draft.embedding)
        )
        scores = F.linear(out, model.lm_head.weight[:vocab])
        errors[f"logits {step}"] = float((scores - logits).abs().max() / logits.std())
        errors[f"state {step}"] = float((state - hidden).abs().max() / hidden.std())
        hidden, theirs = hidden[-1:], state[-1:]
    return errors


@torch.no_grad()
def compare_block(model: Any, draft: Any, aux: Tensor, token_ids: Tensor) -> dict[str, float]:
    """Draft one block behind a prompt in both."""
    caches = draft.start()
    draft.read(token_ids, aux, caches)
    said: list[Tensor] = []

    def greedy(logits: Tensor) -> Tensor:
        said.append(logits)
        return logits.argmax(-1)

    draft.draft(token_ids[:1], caches, num_tokens=draft.num_drafted, choose=greedy)
    logits = torch.cat(said)
    context = model.project_target_hidden(aux)
    for layer in model.layers:
        attention = layer.self_attn
        key, value = attention.kv_proj_only(context)
        key = attention.apply_k_rope(torch.arange(LENGTH), attention.apply_k_norm(key))
        shape = (LENGTH, attention.num_kv_heads, -1)
        attention.attn.cache.append(key.view(shape), value.view(shape))
    masks = torch.full((BLOCK - 1,), model.config.dflash_config["mask_token_id"])
    ids = torch.cat([token_ids[:1], masks])
    positions = torch.arange(LENGTH, LENGTH + BLOCK)
    out = model(ids, positions, None, input_embeds=F.embedding(ids, draft.embedding))
    states = out.hidden_states[BLOCK - draft.num_drafted :]
    scores = states @ draft.frozen_head.T
    if hasattr(model, "markov_head"):
        _, (scores,) = model.markov_head.sample_block(
            scores[None],
            first_prev_tokens=token_ids[:1],
            hidden_states=states[None],
            sampler=lambda logits, _: logits.argmax(-1),
        )
    return {"logits": float((scores - logits).abs().max() / logits.std())}


def captured_by_sglang(engine: Any, choose: str, layer_ids: list[int], tokens: Any) -> Tensor:
    """Return what the target's model captures itself if told these layers of config.json."""
    runner = engine._runner
    getattr(runner.model, choose)(layer_ids)
    batch = engine._builder.build(tokens.token_ids, tokens.position_ids, [tokens.num_tokens])
    context = engine._contexts.ForwardContext(attn_backend=runner.attn_backend)
    with torch.no_grad(), engine._contexts.forward_context(context):
        runner.attn_backend.init_forward_metadata(batch)
        _, states = engine.body(batch.input_ids, batch.positions, batch)
    runner.model.model.layers_to_capture = []
    return torch.cat(list(states), dim=-1)


def serve(_rank: int, path: Path, exports: Path, seed: int) -> dict[str, Any]:
    """Run in a fresh process: load and compare every export."""
    from colospec.engine.sglang import SglangEngine

    target = Target.load(path)
    spec = FeatureSpec(tuple(AUX), True, target.hidden_size, target.dtype)
    asked = EngineSettings(
        config=EngineConfig(name="sglang"),
        target=target,
        spec=spec,
        weights=Weights.pretrained,
        trust_remote_code=False,
        device=CPU,
        max_tokens=64,
        max_sequences=2,
    )
    engine = SglangEngine(asked)
    tokens = random_batch([LENGTH], vocab_size=targets.VOCAB_SIZE, seed=seed)
    aux = capture(engine, tokens, CPU).aux_hidden_states
    seen: dict[str, Any] = {}
    for name in DRAFTS:
        draft = load_draft(exports / name, target)
        model, empty = load_in_sglang(engine._runner, exports / name)
        use_plain_attention(model)
        eagle = name.startswith("eagle3")
        config = model.config.eagle_config if eagle else model.config.dflash_config
        ids = config["eagle_aux_hidden_state_layer_ids" if eagle else "target_layer_ids"]
        choose = f"set_{'eagle3' if eagle else 'dflash'}_layers_to_capture"
        states = captured_by_sglang(engine, choose, ids, tokens)
        compare = compare_chain if eagle else compare_block
        hot = getattr(model, "hot_token_id", None)
        seen[name] = {
            "class": type(model).__name__,
            "empty": empty,
            "errors": compare(model, draft, states, tokens.token_ids),
            "aux": float((states - aux).abs().max()),
            "hot": None if hot is None else torch.equal(hot, draft.target_ids),
            "block": getattr(model, "block_size", None),
        }
    engine.close()
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    seed = random.SystemRandom().randrange(1 << 30)
    path = targets.save(tmp_path_factory.mktemp("qwen3"), "Qwen3", seed=seed)
    exports = tmp_path_factory.mktemp("exports")
    target = Target.load(path)
    counts = torch.randint(0, 1000, (targets.VOCAB_SIZE,))
    for name, config in DRAFTS.items():
        draft = registry.build(config, target, token_counts=counts)
        with torch.no_grad():
            for parameter in draft.parameters():
                # Norms of one would hide which of them was loaded.
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        export_draft(
            draft.state_dict(),
            exports / name,
            config=config,
            target=target,
            facts={},
            dtype=torch.float32,
        )
    (found,) = run_ranks(serve, 1, path, exports, seed, timeout_s=240)
    return dict(found)


@pytest.mark.parametrize("name", DRAFTS)
def test_sglangs_own_model_loads_every_parameter(seen: dict[str, Any], name: str) -> None:
    eagle = name.startswith("eagle3")
    assert seen[name]["class"] == CLASSES[name.split(".")[0].split()[0]]
    # The target's embedding takes the place of this one.
    assert seen[name]["empty"] == (["model.embed_tokens.weight"] if eagle else [])


@pytest.mark.parametrize("name", DRAFTS)
def test_sglang_captures_the_layers_that_the_draft_was_trained_on(
    seen: dict[str, Any], name: str
) -> None:
    assert seen[name]["aux"] < 1e-4


@pytest.mark.parametrize("name", DRAFTS)
def test_sglang_computes_what_we_compute(seen: dict[str, Any], name: str) -> None:
    assert seen[name]["errors"]
    assert max(seen[name]["errors"].values()) < 1e-3, seen[name]["errors"]


def test_sglang_proposes_the_tokens_of_a_pruned_vocabulary(seen: dict[str, Any]) -> None:
    assert seen["eagle3"]["hot"] is True
    assert seen["eagle3.1"]["hot"] is None
    assert seen["dflash"]["block"] == BLOCK
