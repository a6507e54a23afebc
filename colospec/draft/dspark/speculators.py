"""DSpark in the layout of speculators, which vLLM serves.

That of DFlash, with the settings of the heads, and the slot of the given token drafts as well. vLLM
0.33 has the vanilla correction alone.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.dflash.speculators import DFlashSpeculators
from colospec.draft.dspark.config import DSparkConfig, MarkovHeadType
from colospec.draft.dspark.public import HEADS, DSparkFormat
from colospec.draft.public import CardText
from colospec.draft.speculators import serve_with_vllm


class DSparkSpeculators(DFlashSpeculators, DSparkFormat):
    """The `DSparkDraftModel` of speculators."""

    kind = "dspark"
    architectures = ("DSparkSpeculator", "DSparkDraftModel")
    from_anchor = True
    heads = HEADS

    def check(self, config: DraftConfig) -> None:
        assert isinstance(config, DSparkConfig)
        super().check(config)
        if config.markov_head_type is not MarkovHeadType.vanilla:
            raise ValueError(
                f"export.format=speculators: vLLM has no draft.markov_head_type="
                f"{config.markov_head_type.value}, only vanilla; use export.format=sglang"
            )

    def card(self, contents: dict[str, Any]) -> CardText:
        rows = self.rows(self.facts(contents))
        serve = serve_with_vllm(contents, "dspark", self.num_tokens(contents["block_size"]))
        return CardText("DSpark", "dspark", rows, serve)
