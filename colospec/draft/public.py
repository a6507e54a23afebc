"""How a draft looks outside colospec: the formats that inference engines load, as data.

Each algorithm has a `PublicFormat` beside its module, and one more for every other layout that it
can be written in. Files are read and written by `checkpoint`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from colospec.config import DraftConfig, ExportFormat
from colospec.target import Target

Shapes = dict[str, tuple[int, ...]]
SPECULATORS_KEY = "speculators_model_type"
"""In every config.json of speculators, and in no other."""
TARGETS_OWN = frozenset(("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"))
"""Tensors of the target that other programs write into a draft's file."""
MAPPING = {"t2d": "bool", "d2t": "int64"}
"""Tensors of a pruned vocabulary, which are not trained, and their dtypes by torch's name."""


@dataclass(frozen=True)
class CardText:
    """What the model card says of an algorithm: its name, its tag on model hubs, rows of the table
    of facts, and how to serve it (Markdown; TARGET and DRAFT stand for the directories)."""

    title: str
    tag: str
    rows: dict[str, str]
    serve: str


class PublicFormat:
    """Tensor names, config.json and model card of one algorithm in one layout.

    `name` is what export.format says. `architectures` are the entries in config.json that mean this
    format: the first is written, all are read. `may_lack` are tensors that a file of another
    program may leave out: the draft's own start values stand in.
    """

    name: ClassVar[ExportFormat] = ExportFormat.sglang
    architectures: ClassVar[tuple[str, ...]]
    may_lack: ClassVar[frozenset[str]] = frozenset()

    def matches(self, contents: dict[str, Any]) -> bool:
        """Return whether a config.json is of this format."""
        names = contents.get("architectures")
        first = names[0] if isinstance(names, list) and names else None
        return SPECULATORS_KEY not in contents and first in self.architectures

    def check(self, config: DraftConfig) -> None:
        """Raise ValueError for a draft that engines would serve wrongly from this format."""

    def tensor_shapes(self, config: DraftConfig, target: Target) -> Shapes:
        """Return the shape of every tensor, by name: those of the module's state dict."""
        raise NotImplementedError

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        """Return config.json, without dtype and architectures; `colospec` holds what only we
        read."""
        raise NotImplementedError

    def read_config(self, contents: dict[str, Any]) -> DraftConfig:
        """Return the settings that a config.json stands for; what it does not tell stays at its
        default. Raises ValueError for what we cannot reproduce."""
        raise NotImplementedError

    def facts(self, contents: dict[str, Any]) -> dict[str, Any]:
        """Return the part of config.json that `target_facts`, and the target's rope, are to be
        compared with."""
        return contents

    def target_facts(self, target: Target) -> dict[str, Any]:
        """Return what config.json says in every draft of `target`, where it says it at all."""
        raise NotImplementedError

    def inputs(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        """Return settings, by name, that weights depend on although no shape does."""
        raise NotImplementedError

    def tensor_name(self, name: str) -> str | None:
        """Return our name of a tensor in a file of this format, written by any program; None for
        one that is the target's own, which we take from the target."""
        return name

    def file_name(self, name: str) -> str:
        """Return the name under which our tensor `name` is written."""
        return name

    def card(self, contents: dict[str, Any]) -> CardText:
        """Return what the model card says, given config.json."""
        raise NotImplementedError

    def sglang_arguments(self, config: DraftConfig, chain_length: int) -> dict[str, Any]:
        """Return the arguments of SGLang, all named `speculative_...` but without the path, by
        which it proposes `chain_length` tokens per verify step.

        Raises ValueError for what SGLang does not serve.
        """
        del chain_length
        raise ValueError(f"SGLang does not serve draft.algorithm={config.algorithm}")

    def num_parameters(self, config: DraftConfig, target: Target) -> int:
        """Return how many numbers are trained."""
        shapes = self.tensor_shapes(config, target)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in MAPPING)


def vllm_command(method: str, num_tokens: int, **more: Any) -> str:
    """Return the card's command for vLLM; `num_tokens` are drafted before they are verified, and
    `more` are other settings of its speculative config."""
    settings = {"method": method, "model": "DRAFT", "num_speculative_tokens": num_tokens, **more}
    return f"    vllm serve TARGET \\\n        --speculative-config '{json.dumps(settings)}'\n"


def layer_fields(target: Target, intermediate_size: int | None) -> dict[str, Any]:
    """Return the fields of config.json that all drafts copy from the target."""
    hf = target.hf_config
    return {
        "hidden_size": target.hidden_size,
        "target_hidden_size": target.hidden_size,
        "intermediate_size": intermediate_size or target.intermediate_size,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": target.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
        **rope_fields(target),
        "vocab_size": target.vocab_size,
        **{key: hf.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def layer_shapes(
    name: str, target: Target, *, intermediate_size: int | None, input_size: int
) -> Shapes:
    """Return the shapes of a decoder layer called `name`, whose attention reads [., input_size]
    and adds to states [., hidden_size]."""
    hidden, mlp = target.hidden_size, intermediate_size or target.intermediate_size
    query = target.num_attention_heads * target.head_dim
    key = target.num_key_value_heads * target.head_dim
    shapes: Shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, input_size),
        "self_attn.k_proj": (key, input_size),
        "self_attn.v_proj": (key, input_size),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return {f"{name}.{part}.weight": shape for part, shape in shapes.items()}


def draft_vocab_size(wanted: int | None, target: Target) -> int:
    """Return how many tokens a draft can propose, of draft.draft_vocab_size."""
    return min(wanted or target.vocab_size, target.vocab_size)


def layer_facts(target: Target) -> dict[str, Any]:
    """Return the fields among `layer_fields` that a draft of another target would differ in."""
    return {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": target.head_dim,
        "rms_norm_eps": float(target.hf_config.get("rms_norm_eps", 1e-6)),
    }


def rope_fields(target: Target) -> dict[str, Any]:
    """Return the target's rope fields in the spellings of transformers 4 and 5, for all engines."""
    rope = merged_rope(target.hf_config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }
    if partial := partial_rotation(target.hf_config):
        fields["partial_rotary_factor"] = partial
    return fields


def merged_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json says of rope in the spelling of transformers 5: one flat dict with
    rope_type and rope_theta."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    # Targets that mix layer types keep one dict per type; the draft attends to everything.
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return {**rope, "rope_type": kind, "rope_theta": theta}


def partial_rotation(config: dict[str, Any]) -> float | None:
    """Return the share of a head that a config.json says is rotated; None where it does not."""
    share: float | None = merged_rope(config).get("partial_rotary_factor")
    return share or config.get("partial_rotary_factor")
