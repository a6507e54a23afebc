"""The public P-EAGLE format: config.json and tensors that vLLM loads as it does EAGLE-3's.

Tensor names are those of the draft module; the target's embedding is not written. Layer ids appear
twice, as for EAGLE-3: in `eagle_config` layer i means the output of decoder layer i from 0, at the
top level number j means the input of layer j.
"""

from __future__ import annotations

from typing import Any, ClassVar

from colospec.config import DraftConfig
from colospec.draft.layers import chosen_mask_token, eagle3_layers
from colospec.draft.peagle.config import PEagleConfig
from colospec.draft.public import (
    TARGETS_OWN,
    CardText,
    PublicFormat,
    Shapes,
    draft_vocab_size,
    layer_facts,
    layer_fields,
)
from colospec.target import Target

_SERVE = """\
SGLang 0.5.17 has no P-EAGLE, and vLLM 0.33 reads it in the layout of speculators. Export the
checkpoint again with

    python -m colospec.checkpoint.export CHECKPOINT_DIR OUT_DIR --format speculators
"""


class PEagleFormat(PublicFormat):
    """`PEagleDraftModel`, the names of vLLM and of the published trainers."""

    architectures: ClassVar[tuple[str, ...]] = ("PEagleDraftModel",)

    def tensor_shapes(self, config: DraftConfig, target: Target) -> Shapes:
        assert isinstance(config, PEagleConfig)
        hidden, vocab = target.hidden_size, target.vocab_size
        aux = len(eagle3_layers(config.aux_layer_ids, target)) * hidden
        draft_vocab = draft_vocab_size(config.draft_vocab_size, target)
        shapes: Shapes = {
            "fc.weight": (hidden, aux),
            "mask_hidden": (1, 1, aux),
            "norm.weight": (hidden,),
            "lm_head.weight": (draft_vocab, hidden),
            "layers.0.hidden_norm.weight": (hidden,),
        }
        for number in range(config.num_layers):
            width = hidden if number else 2 * hidden
            layer = _layer(target, width, config.intermediate_size or target.intermediate_size)
            shapes |= {f"layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        if draft_vocab < vocab:
            shapes |= {"t2d": (vocab,), "d2t": (draft_vocab,)}
        return shapes

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, PEagleConfig)
        layers = eagle3_layers(config.aux_layer_ids, target)
        mask = chosen_mask_token(config.mask_token_id, target)
        return {
            "model_type": "llama",
            **layer_fields(target, config.intermediate_size),
            "num_hidden_layers": config.num_layers,
            "draft_vocab_size": draft_vocab_size(config.draft_vocab_size, target),
            "tie_word_embeddings": False,
            "norm_before_residual": False,
            "norm_output": False,
            "fc_norm": False,
            "num_aux_hidden_states": len(layers),
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": list(layers),
                "use_aux_hidden_state": True,
            },
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
            "mask_token_id": mask,
            "ptd_token_id": mask,
            "pard_token": mask,
            "colospec": {"num_depths": config.num_depths},
        }

    def read_config(self, contents: dict[str, Any]) -> PEagleConfig:
        flat = self.facts(contents)
        for name in ("norm_before_residual", "norm_before_fc", "norm_output", "fc_norm"):
            if flat.get(name):
                raise ValueError(f"{name}=true is a variant of P-EAGLE that is not known here")
        layers = (flat.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        if layers is None and (inputs := flat.get("eagle_aux_hidden_state_layer_ids")):
            layers = [layer - 1 for layer in inputs]
        mask = flat.get("mask_token_id", flat.get("ptd_token_id"))
        if mask is None:
            raise ValueError("mask_token_id is missing")
        depths = flat.get("colospec", {}).get("num_depths", flat.get("para_num"))
        return PEagleConfig(
            aux_layer_ids=layers,
            num_layers=flat["num_hidden_layers"],
            num_depths=depths or _proposed(flat) or PEagleConfig.num_depths,
            draft_vocab_size=flat.get("draft_vocab_size"),
            intermediate_size=flat.get("intermediate_size"),
            mask_token_id=mask,
        )

    def target_facts(self, target: Target) -> dict[str, Any]:
        return layer_facts(target)

    def inputs(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, PEagleConfig)
        return {
            "aux_layer_ids": eagle3_layers(config.aux_layer_ids, target),
            "mask_token_id": chosen_mask_token(config.mask_token_id, target),
        }

    def tensor_name(self, name: str) -> str | None:
        return None if name in TARGETS_OWN else name

    def card(self, contents: dict[str, Any]) -> CardText:
        return CardText("P-EAGLE", "peagle", self.rows(contents), _SERVE)

    def rows(self, contents: dict[str, Any]) -> dict[str, str]:
        """Return the card's facts of a config.json."""
        depths = contents["colospec"]["num_depths"]
        layers = contents["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        return {
            "layers": str(contents["num_hidden_layers"]),
            "drafted at once": f"{depths} tokens",
            "draft vocabulary": (
                f"{contents['draft_vocab_size']:,} of {contents['vocab_size']:,} tokens"
            ),
            "mask token": str(contents["mask_token_id"]),
            "aux layers of the target": ", ".join(map(str, layers)),
        }


def _layer(target: Target, width: int, mlp: int) -> Shapes:
    hidden, head = target.hidden_size, target.head_dim
    query, key = target.num_attention_heads * head, target.num_key_value_heads * head
    return {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }


def _proposed(contents: dict[str, Any]) -> int | None:
    methods = (contents.get("speculators_config") or {}).get("proposal_methods") or [{}]
    number: int | None = methods[0].get("speculative_tokens")
    return number
