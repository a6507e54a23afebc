"""DFlash in the layout of speculators, which vLLM serves.

Tensor names are those of the native format. vLLM 0.33 gives every layer of such a draft the same
mask inside a block: causal unless `sliding_window_non_causal`. So a draft of full layers says true,
one of sliding layers false, and one that mixes them cannot be served from this layout.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.dflash.layers import block_layers, mask_token_id
from colospec.draft.dflash.public import SLIDING, DFlashFormat
from colospec.draft.public import CardText
from colospec.draft.speculators import (
    SpeculatorsFormat,
    input_layers,
    layer_config,
    output_layers,
    serve_with_vllm,
    speculators_fields,
)
from colospec.target import Target

# Of the native config.json, what is no setting of a layer.
_OUTSIDE = ("block_size", "dflash_config", "num_target_layers", "colospec")


class DFlashSpeculators(SpeculatorsFormat, DFlashFormat):
    """The `DFlashDraftModel` of speculators."""

    kind = "dflash"
    architectures = ("DFlashSpeculator", "DFlashDraftModel")

    def check(self, config: DraftConfig) -> None:
        assert isinstance(config, DFlashConfig)
        if 0 < len(config.sliding_layers) < config.num_layers:
            raise ValueError(
                f"export.format=speculators cannot hold draft.sliding_layers="
                f"{config.sliding_layers} of {config.num_layers} layers: vLLM would mask all "
                "layers alike; use export.format=sglang, which vLLM reads too"
            )

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, DFlashConfig)
        native = super().config_fields(config, target)
        layer = {key: value for key, value in native.items() if key not in _OUTSIDE}
        return {
            **speculators_fields(self.kind, target, layer, num_tokens=config.block_size - 1),
            "draft_vocab_size": target.vocab_size,
            "target_hidden_size": target.hidden_size,
            "block_size": config.block_size,
            "mask_token_id": mask_token_id(config, target),
            "aux_hidden_state_layer_ids": input_layers(block_layers(config, target)),
            "sliding_window_non_causal": not config.sliding_layers,
            "sample_from_anchor": False,
            "colospec": native["colospec"],
        }

    def facts(self, contents: dict[str, Any]) -> dict[str, Any]:
        layer = layer_config(contents)
        size = contents.get("draft_vocab_size")
        if size is not None and size != layer.get("vocab_size"):
            raise ValueError(
                f"draft_vocab_size={size}: a DFlash draft has the target's vocabulary here"
            )
        if contents.get("sample_from_anchor"):
            raise ValueError(
                "sample_from_anchor=true is a variant of DFlash that is not known here"
            )
        sliding = SLIDING in (layer.get("layer_types") or [])
        if sliding and contents.get("sliding_window_non_causal", True):
            raise ValueError("sliding_window_non_causal=true: sliding layers are causal here")
        return layer | {
            "block_size": contents["block_size"],
            "mask_token_id": contents["mask_token_id"],
            "target_layer_ids": output_layers(contents["aux_hidden_state_layer_ids"]),
            "colospec": contents.get("colospec", {}),
        }

    def card(self, contents: dict[str, Any]) -> CardText:
        serve = serve_with_vllm(contents, "dflash", contents["block_size"] - 1)
        return CardText("DFlash", "dflash", self.rows(self.facts(contents)), serve)
