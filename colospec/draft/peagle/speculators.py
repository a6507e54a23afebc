"""P-EAGLE in the layout of speculators, the only one that vLLM 0.33 serves.

Tensor names are those of the native format.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.layers import chosen_mask_token, eagle3_layers
from colospec.draft.peagle.config import PEagleConfig
from colospec.draft.peagle.public import PEagleFormat
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


class PEagleSpeculators(SpeculatorsFormat, PEagleFormat):
    """The `PEagleDraftModel` of speculators."""

    kind = "peagle"
    architectures = ("PEagleSpeculator", "PEagleDraftModel")

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, PEagleConfig)
        native = super().config_fields(config, target)
        layers = eagle3_layers(config.aux_layer_ids, target)
        layer = {
            "model_type": "llama",
            **layer_fields(target, config.intermediate_size),
            "num_hidden_layers": config.num_layers,
            "tie_word_embeddings": False,
            # vLLM counts them here, and takes 3 where the number is missing.
            "num_aux_hidden_states": len(layers),
        }
        return {
            **speculators_fields(self.kind, target, layer, num_tokens=config.num_depths),
            "draft_vocab_size": native["draft_vocab_size"],
            "target_hidden_size": target.hidden_size,
            "norm_before_residual": False,
            "norm_before_fc": False,
            "fc_norm": False,
            "norm_output": False,
            "embed_requires_grad": False,
            "mask_token_id": chosen_mask_token(config.mask_token_id, target),
            "eagle_aux_hidden_state_layer_ids": input_layers(layers),
            "colospec": native["colospec"],
        }

    def facts(self, contents: dict[str, Any]) -> dict[str, Any]:
        inputs = contents.get("eagle_aux_hidden_state_layer_ids")
        own = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": output_layers(inputs)}}
        return layer_config(contents) | contents | own

    def card(self, contents: dict[str, Any]) -> CardText:
        facts = self.facts(contents)
        depths = facts["colospec"]["num_depths"]
        serve = serve_with_vllm(contents, "eagle3", depths, parallel_drafting=True)
        return CardText("P-EAGLE", "peagle", self.rows(facts), serve)
