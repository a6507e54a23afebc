"""DFlash in the layout of speculators, which vLLM serves.

Tensor names are those of the native format. vLLM 0.33 gives every layer of such a draft the same
mask inside a block: causal unless `sliding_window_non_causal`. So a draft of full layers says true,
one of sliding layers false, and one that mixes them cannot be served from this layout.
"""

from __future__ import annotations

from typing import Any, ClassVar

from colospec.config import DraftConfig
from colospec.draft.dflash.config import BlockConfig
from colospec.draft.dflash.layers import block_layers
from colospec.draft.dflash.public import SLIDING, DFlashFormat
from colospec.draft.layers import chosen_mask_token
from colospec.draft.public import CardText
from colospec.draft.speculators import (
    SpeculatorsFormat,
    input_layers,
    output_layers,
    serve_with_vllm,
    speculators_fields,
)
from colospec.target import Target

# Of the native config.json, what is no setting of a layer.
_OUTSIDE = (
    "block_size",
    "colospec",
    "dflash_config",
    "mask_token_id",
    "num_target_layers",
    "target_layer_ids",
)


class DFlashSpeculators(SpeculatorsFormat, DFlashFormat):
    """The `DFlashDraftModel` of speculators.

    `from_anchor` says whether the first slot, which reads the given token, drafts one too; `heads`
    are settings that speculators has beside those of the layers.
    """

    kind = "dflash"
    architectures = ("DFlashSpeculator", "DFlashDraftModel")
    from_anchor: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ()

    def check(self, config: DraftConfig) -> None:
        assert isinstance(config, BlockConfig)
        if 0 < len(config.sliding_layers) < config.num_layers:
            raise ValueError(
                f"export.format=speculators cannot hold draft.sliding_layers="
                f"{config.sliding_layers} of {config.num_layers} layers: vLLM would mask all "
                "layers alike; use export.format=sglang, which vLLM reads too"
            )

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, BlockConfig)
        native = super().config_fields(config, target)
        mask, layers = chosen_mask_token(config.mask_token_id, target), block_layers(config, target)
        beside = {*_OUTSIDE, *self.heads}
        layer = {key: value for key, value in native.items() if key not in beside}
        num_tokens = self.num_tokens(config.block_size)
        return {
            **speculators_fields(self.kind, target, layer, num_tokens=num_tokens),
            "draft_vocab_size": target.vocab_size,
            "target_hidden_size": target.hidden_size,
            "block_size": config.block_size,
            "mask_token_id": mask,
            "aux_hidden_state_layer_ids": input_layers(layers),
            "sliding_window_non_causal": not config.sliding_layers,
            "sample_from_anchor": self.from_anchor,
            **{key: native[key] for key in self.heads},
            "colospec": native["colospec"],
        }

    def num_tokens(self, block_size: int) -> int:
        """Return how many tokens a block drafts."""
        return block_size if self.from_anchor else block_size - 1

    def facts(self, contents: dict[str, Any]) -> dict[str, Any]:
        layer: dict[str, Any] = contents["transformer_layer_config"]
        size = contents.get("draft_vocab_size")
        if size is not None and size != layer.get("vocab_size"):
            raise ValueError(
                f"draft_vocab_size={size}: such a draft has the target's vocabulary here"
            )
        if (value := contents.get("sample_from_anchor", self.from_anchor)) != self.from_anchor:
            raise ValueError(
                f"sample_from_anchor={value} is a variant of {self.kind} that is not known here"
            )
        sliding = SLIDING in (layer.get("layer_types") or [])
        if sliding and contents.get("sliding_window_non_causal", True):
            raise ValueError("sliding_window_non_causal=true: sliding layers are causal here")
        return layer | {
            "block_size": contents["block_size"],
            "mask_token_id": contents["mask_token_id"],
            "target_layer_ids": output_layers(contents["aux_hidden_state_layer_ids"]),
            **{key: contents[key] for key in self.heads if key in contents},
            "colospec": contents.get("colospec", {}),
        }

    def card(self, contents: dict[str, Any]) -> CardText:
        serve = serve_with_vllm(contents, "dflash", self.num_tokens(contents["block_size"]))
        return CardText("DFlash", "dflash", self.rows(self.facts(contents)), serve)
