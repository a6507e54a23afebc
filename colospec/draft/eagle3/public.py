"""The public EAGLE-3 format: config.json and the tensors that SGLang and vLLM load.

Tensor names are those of the draft module. The target's embedding is not written: engines share the
target's own. Engines skip tensors that they do not know without a word, so the list is exact. Read
are also other spellings: names that begin with `model.`, `layers.0` for the layer, and `aux_norm_*`
for the norms before the projection.

Layer ids appear twice in config.json. In `eagle_config`, which SGLang reads, layer i means the
output of decoder layer i from 0, as everywhere in colospec. At the top level, which vLLM reads,
number j means the input of layer j, so it is one more.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.layers import eagle3_layers
from colospec.draft.public import (
    TARGETS_OWN,
    CardText,
    PublicFormat,
    Shapes,
    draft_vocab_size,
    layer_facts,
    layer_fields,
    vllm_command,
)
from colospec.target import Target

EAGLE3_TOKENS = 3
"""Tokens that an engine drafts before the target verifies them, unless the user says otherwise."""
_OTHER_NAMES = {
    "layers.0.": "midlayer.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
_SERVE = f"""\
SGLang (0.5.17):

    python -m sglang.launch_server --model-path TARGET \\
        --speculative-algorithm EAGLE3 --speculative-draft-model-path DRAFT \\
        --speculative-num-steps {EAGLE3_TOKENS} --speculative-eagle-topk 1 \\
        --speculative-num-draft-tokens {EAGLE3_TOKENS + 1}

vLLM (0.33):

{vllm_command("eagle3", EAGLE3_TOKENS)}"""


class Eagle3Format(PublicFormat):
    """SGLang's and vLLM's `LlamaForCausalLMEagle3`."""

    architectures = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
    may_lack = frozenset(("lm_head.weight", "t2d"))

    def check(self, config: DraftConfig) -> None:
        assert isinstance(config, Eagle3Config)
        if config.norm_before_residual:
            raise ValueError(
                f"export.format={self.name.value} cannot hold draft.norm_before_residual=true, "
                "which SGLang would ignore; use export.format=speculators"
            )

    def tensor_shapes(self, config: DraftConfig, target: Target) -> Shapes:
        assert isinstance(config, Eagle3Config)
        num_aux = len(eagle3_layers(config.aux_layer_ids, target))
        hidden, vocab = target.hidden_size, target.vocab_size
        mlp = config.intermediate_size or target.intermediate_size
        query = target.num_attention_heads * target.head_dim
        key = target.num_key_value_heads * target.head_dim
        draft_vocab = draft_vocab_size(config.draft_vocab_size, target)
        shapes: Shapes = {
            "fc.weight": (hidden, num_aux * hidden),
            "midlayer.input_layernorm.weight": (hidden,),
            "midlayer.hidden_norm.weight": (hidden,),
            "midlayer.post_attention_layernorm.weight": (hidden,),
            "midlayer.self_attn.q_proj.weight": (query, 2 * hidden),
            "midlayer.self_attn.k_proj.weight": (key, 2 * hidden),
            "midlayer.self_attn.v_proj.weight": (key, 2 * hidden),
            "midlayer.self_attn.o_proj.weight": (hidden, query),
            "midlayer.mlp.gate_proj.weight": (mlp, hidden),
            "midlayer.mlp.up_proj.weight": (mlp, hidden),
            "midlayer.mlp.down_proj.weight": (hidden, mlp),
            "norm.weight": (hidden,),
            "lm_head.weight": (draft_vocab, hidden),
        }
        if config.fc_norm:
            shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(num_aux)}
        if draft_vocab < vocab:
            shapes |= {"t2d": (vocab,), "d2t": (draft_vocab,)}
        return shapes

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, Eagle3Config)
        layers = eagle3_layers(config.aux_layer_ids, target)
        return {
            "model_type": "llama",
            **layer_fields(target, config.intermediate_size),
            "num_hidden_layers": 1,
            "draft_vocab_size": draft_vocab_size(config.draft_vocab_size, target),
            "tie_word_embeddings": False,
            "norm_output": config.norm_output,
            "norm_before_residual": config.norm_before_residual,
            "fc_norm": config.fc_norm,
            "num_aux_hidden_states": len(layers),
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": list(layers),
                "use_aux_hidden_state": True,
            },
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
            "colospec": {"ttt_length": config.ttt_length},
        }

    def read_config(self, contents: dict[str, Any]) -> Eagle3Config:
        contents = self.facts(contents)
        eagle_config = contents.get("eagle_config") or {}
        if eagle_config.get("norm_before_fc", contents.get("norm_before_fc")):
            raise ValueError("norm_before_fc=true is a variant of EAGLE-3 that is not known here")
        layers = eagle_config.get("eagle_aux_hidden_state_layer_ids")
        if layers is None and (inputs := contents.get("eagle_aux_hidden_state_layer_ids")):
            layers = [layer - 1 for layer in inputs]
        return Eagle3Config(
            aux_layer_ids=layers,
            ttt_length=contents.get("colospec", {}).get("ttt_length", Eagle3Config.ttt_length),
            draft_vocab_size=contents.get("draft_vocab_size"),
            intermediate_size=contents.get("intermediate_size"),
            norm_output=bool(contents.get("norm_output", False)),
            norm_before_residual=bool(contents.get("norm_before_residual", False)),
            fc_norm=bool(contents.get("fc_norm") or contents.get("use_aux_norm")),
        )

    def target_facts(self, target: Target) -> dict[str, Any]:
        return layer_facts(target) | {"num_hidden_layers": 1}

    def inputs(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, Eagle3Config)
        return {
            "aux_layer_ids": eagle3_layers(config.aux_layer_ids, target),
            "norm_output": config.norm_output,
            "norm_before_residual": config.norm_before_residual,
            "fc_norm": config.fc_norm,
        }

    def sglang_arguments(self, config: DraftConfig, chain_length: int) -> dict[str, Any]:
        del config
        return {
            "speculative_algorithm": "EAGLE3",
            "speculative_num_steps": chain_length,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": chain_length + 1,
        }

    def tensor_name(self, name: str) -> str | None:
        name = name.removeprefix("model.")
        if name in TARGETS_OWN:
            return None
        for theirs, ours in _OTHER_NAMES.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def card(self, contents: dict[str, Any]) -> CardText:
        layers = contents["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        rows = {
            "draft vocabulary": (
                f"{contents['draft_vocab_size']:,} of {contents['vocab_size']:,} tokens"
            ),
            "aux layers of the target": ", ".join(map(str, layers)),
            "training-time test": f"{contents['colospec']['ttt_length']} steps",
        }
        return CardText("EAGLE-3", "eagle3", rows, _SERVE)
