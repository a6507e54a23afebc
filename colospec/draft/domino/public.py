"""The published Domino format: that of DFlash with the tensors and settings of the correction.

No released engine loads it; the trainers that write it name the class `DominoDraftModel`.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.dflash.public import DFlashFormat
from colospec.draft.domino.config import DominoConfig
from colospec.draft.public import CardText, PublicFormat, Shapes
from colospec.target import Target

_SETTINGS = ("shift_label", "gru_hidden_dim", "emb_dim", "pure_draft_prefix_len")
_SERVE = """\
No released version of SGLang or vLLM serves Domino. Measure it with colospec itself:

    python -m colospec.evaluate --target TARGET --draft DRAFT --prompts FILE
"""


class DominoFormat(DFlashFormat):
    """`DominoDraftModel`, as its authors' trainers write it."""

    architectures = ("DominoDraftModel",)

    def tensor_shapes(self, config: DraftConfig, target: Target) -> Shapes:
        assert isinstance(config, DominoConfig)
        hidden, width, rank = target.hidden_size, config.gru_hidden_dim, config.emb_dim
        return super().tensor_shapes(config, target) | {
            "prefix_gru.weight_ih_l0": (3 * width, hidden),
            "prefix_gru.weight_hh_l0": (3 * width, width),
            "embed_proj.0.weight": (rank, hidden + width),
            "embed_proj.2.weight": (target.vocab_size, rank),
        }

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, DominoConfig)
        fields = super().config_fields(config, target)
        inner = fields["dflash_config"] | {"projector_type": "domino"}
        inner |= {name: getattr(config, name) for name in _SETTINGS}
        return fields | {"emb_dim": config.emb_dim, "dflash_config": inner}

    def read_config(self, contents: dict[str, Any]) -> DominoConfig:
        inner = contents["dflash_config"]
        if (kind := inner.get("projector_type", "domino")) != "domino":
            raise ValueError(f"projector_type={kind}, expected domino")
        return DominoConfig(**self.settings(contents), **{name: inner[name] for name in _SETTINGS})

    def inputs(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, DominoConfig)
        return super().inputs(config, target) | {
            "shift_label": config.shift_label,
            "pure_draft_prefix_len": config.pure_draft_prefix_len,
        }

    def sglang_arguments(self, config: DraftConfig, chain_length: int) -> dict[str, Any]:
        # Not what DFlash says: SGLang would draft without the correction.
        return PublicFormat.sglang_arguments(self, config, chain_length)

    def card(self, contents: dict[str, Any]) -> CardText:
        inner = contents["dflash_config"]
        drafted = contents["block_size"] - (not inner["shift_label"])
        rows = super().card(contents).rows | {
            "block": f"{contents['block_size']} tokens are read, {drafted} drafted",
            "correction": f"rank {inner['emb_dim']}, GRU of {inner['gru_hidden_dim']}",
        }
        return CardText("Domino", "domino", rows, _SERVE)
