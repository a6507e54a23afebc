"""The public P-EAGLE format: config.json and tensors that vLLM loads as it does EAGLE-3's.

Tensor names are those of the draft module.
"""

from __future__ import annotations

from typing import Any, ClassVar

from colospec.config import DraftConfig
from colospec.draft.layers import chosen_mask_token
from colospec.draft.peagle.config import PEagleConfig
from colospec.draft.pruned_public import PrunedFormat
from colospec.draft.public import TARGETS_OWN, CardText, Shapes, layer_shapes
from colospec.target import Target

_SERVE = """\
SGLang 0.5.17 has no P-EAGLE, and vLLM 0.33 reads it in the layout of speculators. Export the
checkpoint again with

    python -m colospec.checkpoint.export CHECKPOINT_DIR OUT_DIR --format speculators
"""


class PEagleFormat(PrunedFormat):
    """`PEagleDraftModel`, the names of vLLM and of the published trainers."""

    architectures: ClassVar[tuple[str, ...]] = ("PEagleDraftModel",)

    def tensor_shapes(self, config: DraftConfig, target: Target) -> Shapes:
        assert isinstance(config, PEagleConfig)
        hidden, mlp = target.hidden_size, config.intermediate_size
        shapes = super().tensor_shapes(config, target)
        shapes["mask_hidden"] = (1, 1, shapes["fc.weight"][1])
        shapes["layers.0.hidden_norm.weight"] = (hidden,)
        for number in range(config.num_layers):
            width = hidden if number else 2 * hidden
            name = f"layers.{number}"
            shapes |= layer_shapes(name, target, intermediate_size=mlp, input_size=width)
        return shapes

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        fields = super().config_fields(config, target)
        return fields | dict.fromkeys(("ptd_token_id", "pard_token"), fields["mask_token_id"])

    def layer_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, PEagleConfig)
        return super().layer_fields(config, target) | {"num_hidden_layers": config.num_layers}

    def draft_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, PEagleConfig)
        return super().draft_fields(config, target) | {
            "mask_token_id": chosen_mask_token(config.mask_token_id, target),
            "colospec": {"num_depths": config.num_depths},
        }

    def read_config(self, contents: dict[str, Any]) -> PEagleConfig:
        facts = self.facts(contents)
        for name in ("norm_before_residual", "norm_before_fc", "norm_output", "fc_norm"):
            if facts.get(name):
                raise ValueError(f"{name}=true is a variant of P-EAGLE that is not known here")
        mask = facts.get("mask_token_id", facts.get("ptd_token_id"))
        if mask is None:
            raise ValueError("mask_token_id is missing")
        depths = facts.get("colospec", {}).get("num_depths", facts.get("para_num"))
        return PEagleConfig(
            **self.settings(facts),
            num_layers=facts["num_hidden_layers"],
            num_depths=depths or _proposed(facts) or PEagleConfig.num_depths,
            mask_token_id=mask,
        )

    def inputs(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, PEagleConfig)
        mask = chosen_mask_token(config.mask_token_id, target)
        return super().inputs(config, target) | {"mask_token_id": mask}

    def tensor_name(self, name: str) -> str | None:
        return None if name in TARGETS_OWN else name

    def card(self, contents: dict[str, Any]) -> CardText:
        rows = {
            "layers": str(contents["num_hidden_layers"]),
            "drafted at once": f"{contents['colospec']['num_depths']} tokens",
            **self.rows(contents),
            "mask token": str(contents["mask_token_id"]),
        }
        return CardText("P-EAGLE", "peagle", rows, _SERVE)


def _proposed(contents: dict[str, Any]) -> int | None:
    methods = (contents.get("speculators_config") or {}).get("proposal_methods") or [{}]
    number: int | None = methods[0].get("speculative_tokens")
    return number
