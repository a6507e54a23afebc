"""P-EAGLE in the layout of speculators, the only one that vLLM 0.33 serves.

Tensor names are those of the native format.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from colospec.config import DraftConfig
from colospec.draft.peagle.config import PEagleConfig
from colospec.draft.peagle.public import PEagleFormat
from colospec.draft.pruned_public import PrunedSpeculators
from colospec.draft.public import CardText
from colospec.draft.speculators import serve_with_vllm


class PEagleSpeculators(PrunedSpeculators, PEagleFormat):
    """The `PEagleDraftModel` of speculators."""

    kind = "peagle"
    architectures = ("PEagleSpeculator", "PEagleDraftModel")

    def num_tokens(self, config: DraftConfig) -> int:
        assert isinstance(config, PEagleConfig)
        return config.num_depths

    def card(self, contents: dict[str, Any]) -> CardText:
        facts = self.facts(contents)
        depths = facts["colospec"]["num_depths"]
        serve = serve_with_vllm(contents, "eagle3", depths, parallel_drafting=True)
        return replace(super().card(facts), serve=serve)
