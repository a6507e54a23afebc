"""What the public formats of drafts with a head of their own share.

The target's embedding is not written: engines share the target's own. Layer ids appear twice in
config.json. In `eagle_config`, which SGLang reads, layer i means the output of decoder layer i from
0, as everywhere in colospec. At the top level, which vLLM reads, number j means the input of layer
j, so it is one more.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.layers import eagle3_layers
from colospec.draft.public import PublicFormat, Shapes, draft_vocab_size, layer_facts, layer_fields
from colospec.draft.settings import PrunedConfig
from colospec.draft.speculators import (
    SpeculatorsFormat,
    input_layers,
    output_layers,
    speculators_fields,
)
from colospec.target import Target

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


class PrunedFormat(PublicFormat):
    """All but the names of the layers, and what only one algorithm has."""

    def tensor_shapes(self, config: DraftConfig, target: Target) -> Shapes:
        """Return the shapes of projection, last norm, head and vocabulary."""
        assert isinstance(config, PrunedConfig)
        hidden, vocab = target.hidden_size, target.vocab_size
        num_aux = len(eagle3_layers(config.aux_layer_ids, target))
        draft_vocab = draft_vocab_size(config.draft_vocab_size, target)
        shapes: Shapes = {
            "fc.weight": (hidden, num_aux * hidden),
            "norm.weight": (hidden,),
            "lm_head.weight": (draft_vocab, hidden),
        }
        return shapes | ({"t2d": (vocab,), "d2t": (draft_vocab,)} if draft_vocab < vocab else {})

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, PrunedConfig)
        layers = list(eagle3_layers(config.aux_layer_ids, target))
        inner = {LAYER_IDS: layers, "use_aux_hidden_state": True}
        layer = self.layer_fields(config, target)
        return layer | {"eagle_config": inner} | self.draft_fields(config, target)

    def layer_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        """Return the fields that are settings of the draft's layers, of which there is one unless a
        subclass says otherwise."""
        assert isinstance(config, PrunedConfig)
        return {
            "model_type": "llama",
            **layer_fields(target, config.intermediate_size),
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            # In the layout of speculators, vLLM takes 3 where the number is missing.
            "num_aux_hidden_states": len(eagle3_layers(config.aux_layer_ids, target)),
        }

    def draft_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        """Return the fields that are settings of the draft as a whole; subclasses add theirs."""
        assert isinstance(config, PrunedConfig)
        return {
            "draft_vocab_size": draft_vocab_size(config.draft_vocab_size, target),
            "norm_output": False,
            "norm_before_residual": False,
            "fc_norm": False,
            LAYER_IDS: input_layers(eagle3_layers(config.aux_layer_ids, target)),
        }

    def settings(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that all these drafts have, by name, of `facts`."""
        layers = (facts.get("eagle_config") or {}).get(LAYER_IDS)
        if layers is None and (inputs := facts.get(LAYER_IDS)):
            layers = output_layers(inputs)
        return {
            "aux_layer_ids": layers,
            "draft_vocab_size": facts.get("draft_vocab_size"),
            "intermediate_size": facts.get("intermediate_size"),
        }

    def target_facts(self, target: Target) -> dict[str, Any]:
        return layer_facts(target)

    def inputs(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, PrunedConfig)
        return {"aux_layer_ids": eagle3_layers(config.aux_layer_ids, target)}

    def rows(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the card's rows that all these drafts have, of `facts`."""
        return {
            "draft vocabulary": f"{facts['draft_vocab_size']:,} of {facts['vocab_size']:,} tokens",
            "aux layers of the target": ", ".join(map(str, facts["eagle_config"][LAYER_IDS])),
        }


class PrunedSpeculators(SpeculatorsFormat, PrunedFormat):
    """The same in the layout of speculators."""

    def num_tokens(self, config: DraftConfig) -> int:
        """Return how many tokens are drafted before the target verifies them."""
        raise NotImplementedError

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        layer, num_tokens = self.layer_fields(config, target), self.num_tokens(config)
        return {
            **speculators_fields(self.kind, target, layer, num_tokens=num_tokens),
            "target_hidden_size": target.hidden_size,
            "norm_before_fc": False,
            "embed_requires_grad": False,
            **self.draft_fields(config, target),
        }

    def facts(self, contents: dict[str, Any]) -> dict[str, Any]:
        inner = {LAYER_IDS: output_layers(contents.get(LAYER_IDS))}
        layer: dict[str, Any] = contents["transformer_layer_config"]
        return contents | layer | {"eagle_config": inner}
