"""The public EAGLE-3 format: config.json and the tensors that SGLang and vLLM load.

Tensor names are those of the draft module. Engines skip tensors that they do not know without a
word, so the list is exact. Read are also other spellings: names that begin with `model.`,
`layers.0` for the layer, and `aux_norm_*` for the norms before the projection.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.layers import eagle3_layers
from colospec.draft.pruned_public import PrunedFormat
from colospec.draft.public import TARGETS_OWN, CardText, Shapes, layer_shapes, vllm_command
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


class Eagle3Format(PrunedFormat):
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
        hidden, mlp = target.hidden_size, config.intermediate_size
        shapes = super().tensor_shapes(config, target) | layer_shapes(
            "midlayer", target, intermediate_size=mlp, input_size=2 * hidden
        )
        shapes["midlayer.hidden_norm.weight"] = (hidden,)
        if config.fc_norm:
            num_aux = len(eagle3_layers(config.aux_layer_ids, target))
            shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(num_aux)}
        return shapes

    def draft_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, Eagle3Config)
        fields = super().draft_fields(config, target) | _options(config)
        return fields | {"colospec": {"ttt_length": config.ttt_length}}

    def read_config(self, contents: dict[str, Any]) -> Eagle3Config:
        facts = self.facts(contents)
        inner = facts.get("eagle_config") or {}
        if inner.get("norm_before_fc", facts.get("norm_before_fc")):
            raise ValueError("norm_before_fc=true is a variant of EAGLE-3 that is not known here")
        return Eagle3Config(
            **self.settings(facts),
            ttt_length=facts.get("colospec", {}).get("ttt_length", Eagle3Config.ttt_length),
            norm_output=bool(facts.get("norm_output", False)),
            norm_before_residual=bool(facts.get("norm_before_residual", False)),
            fc_norm=bool(facts.get("fc_norm") or facts.get("use_aux_norm")),
        )

    def target_facts(self, target: Target) -> dict[str, Any]:
        return super().target_facts(target) | {"num_hidden_layers": 1}

    def inputs(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, Eagle3Config)
        return super().inputs(config, target) | _options(config)

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
        steps = {"training-time test": f"{contents['colospec']['ttt_length']} steps"}
        return CardText("EAGLE-3", "eagle3", self.rows(contents) | steps, _SERVE)


def _options(config: Eagle3Config) -> dict[str, Any]:
    """Return the settings that change what the weights compute, by their names in config.json."""
    return {
        "norm_output": config.norm_output,
        "norm_before_residual": config.norm_before_residual,
        "fc_norm": config.fc_norm,
    }
