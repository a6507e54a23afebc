"""EAGLE-3 in the layout of speculators, which vLLM serves.

Tensor names are those of the native format but for the layer: `layers.0` instead of `midlayer`. A
`norm_before_residual` that is missing means true to vLLM, so it is always written.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.eagle3.public import EAGLE3_TOKENS, Eagle3Format
from colospec.draft.layers import eagle3_layers
from colospec.draft.public import CardText, layer_fields
from colospec.draft.speculators import (
    SpeculatorsFormat,
    input_layers,
    layer_config,
    output_layers,
    serve_with_vllm,
    speculators_fields,
)
from colospec.target import Target


class Eagle3Speculators(SpeculatorsFormat, Eagle3Format):
    """The `Eagle3DraftModel` of speculators."""

    kind = "eagle3"
    architectures = ("Eagle3Speculator", "Eagle3DraftModel")

    def check(self, config: DraftConfig) -> None:
        """vLLM serves all settings."""

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, Eagle3Config)
        native = super().config_fields(config, target)
        layers = eagle3_layers(config.aux_layer_ids, target)
        layer = {
            "model_type": "llama",
            **layer_fields(target, config.intermediate_size),
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            # vLLM counts them here, and takes 3 where the number is missing.
            "num_aux_hidden_states": len(layers),
        }
        return {
            **speculators_fields(self.kind, target, layer, num_tokens=EAGLE3_TOKENS),
            "draft_vocab_size": native["draft_vocab_size"],
            "target_hidden_size": target.hidden_size,
            "norm_before_residual": config.norm_before_residual,
            "norm_before_fc": False,
            "fc_norm": config.fc_norm,
            "norm_output": config.norm_output,
            "embed_requires_grad": False,
            "eagle_aux_hidden_state_layer_ids": input_layers(layers),
            "colospec": native["colospec"],
        }

    def facts(self, contents: dict[str, Any]) -> dict[str, Any]:
        layer = layer_config(contents)
        return layer | {
            "draft_vocab_size": contents.get("draft_vocab_size"),
            "fc_norm": contents.get("fc_norm", False),
            "norm_output": contents.get("norm_output", False),
            "norm_before_fc": contents.get("norm_before_fc", False),
            "norm_before_residual": contents.get("norm_before_residual", True),
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": output_layers(
                    contents.get("eagle_aux_hidden_state_layer_ids")
                )
            },
            "colospec": contents.get("colospec", {}),
        }

    def file_name(self, name: str) -> str:
        return name.replace("midlayer.", "layers.0.", 1)

    def card(self, contents: dict[str, Any]) -> CardText:
        text = super().card(self.facts(contents))
        return CardText(
            text.title, text.tag, text.rows, serve_with_vllm(contents, "eagle3", EAGLE3_TOKENS)
        )
