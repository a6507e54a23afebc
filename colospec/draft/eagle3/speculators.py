"""EAGLE-3 in the layout of speculators, which vLLM serves.

Tensor names are those of the native format but for the layer: `layers.0` instead of `midlayer`. A
`norm_before_residual` that is missing means true to vLLM, so it is always written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from colospec.config import DraftConfig
from colospec.draft.eagle3.public import EAGLE3_TOKENS, Eagle3Format
from colospec.draft.pruned_public import PrunedSpeculators
from colospec.draft.public import CardText
from colospec.draft.speculators import serve_with_vllm


class Eagle3Speculators(PrunedSpeculators, Eagle3Format):
    """The `Eagle3DraftModel` of speculators."""

    kind = "eagle3"
    architectures = ("Eagle3Speculator", "Eagle3DraftModel")

    def check(self, config: DraftConfig) -> None:
        """vLLM serves all settings."""

    def num_tokens(self, config: DraftConfig) -> int:
        del config
        return EAGLE3_TOKENS

    def facts(self, contents: dict[str, Any]) -> dict[str, Any]:
        return {"norm_before_residual": True} | super().facts(contents)

    def file_name(self, name: str) -> str:
        return name.replace("midlayer.", "layers.0.", 1)

    def card(self, contents: dict[str, Any]) -> CardText:
        text = super().card(self.facts(contents))
        return replace(text, serve=serve_with_vllm(contents, "eagle3", EAGLE3_TOKENS))
