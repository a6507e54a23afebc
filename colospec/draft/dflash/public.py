"""The public DFlash format: config.json and the tensors that SGLang loads as `DFlashDraftModel`.

Tensor names are those of the draft module; embedding and head are the target's and not written.
`dflash_config.target_layer_ids` means outputs of decoder layers from 0, as everywhere in colospec.
Read are also files whose names begin with `model.`, and those of trainers that call the projection
`context_proj`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from colospec.config import DraftConfig
from colospec.draft.dflash.config import BlockConfig, DFlashConfig
from colospec.draft.dflash.layers import block_layers
from colospec.draft.layers import chosen_mask_token
from colospec.draft.public import (
    TARGETS_OWN,
    CardText,
    PublicFormat,
    Shapes,
    layer_facts,
    layer_fields,
    layer_shapes,
    vllm_command,
)
from colospec.target import Target

_OTHER_NAMES = {"context_proj": "fc", "context_norm": "hidden_norm", "final_norm": "norm"}
SLIDING = "sliding_attention"
_SERVE = """\
SGLang (0.5.17):

    python -m sglang.launch_server --model-path TARGET \\
        --speculative-algorithm DFLASH --speculative-draft-model-path DRAFT \\
        --speculative-num-draft-tokens {block_size}

vLLM (0.33{mixed}):

{vllm}"""


class DFlashFormat(PublicFormat):
    """SGLang's and vLLM's `DFlashDraftModel`, the layout of the authors."""

    architectures: ClassVar[tuple[str, ...]] = ("DFlashDraftModel",)

    def tensor_shapes(self, config: DraftConfig, target: Target) -> Shapes:
        assert isinstance(config, BlockConfig)
        hidden, head = target.hidden_size, target.head_dim
        shapes: Shapes = {
            "fc.weight": (hidden, len(block_layers(config, target)) * hidden),
            "hidden_norm.weight": (hidden,),
            "norm.weight": (hidden,),
        }
        for number in range(config.num_layers):
            name, mlp = f"layers.{number}", config.intermediate_size
            shapes |= layer_shapes(name, target, intermediate_size=mlp, input_size=hidden)
            shapes |= {f"{name}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
        return shapes

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, BlockConfig)
        layers = range(config.num_layers)
        return {
            "model_type": "qwen3",
            **layer_fields(target, config.intermediate_size),
            "num_hidden_layers": config.num_layers,
            "num_target_layers": target.num_layers,
            "tie_word_embeddings": False,
            "block_size": config.block_size,
            "layer_types": [
                SLIDING if layer in config.sliding_layers else "full_attention" for layer in layers
            ],
            "use_sliding_window": bool(config.sliding_layers),
            "sliding_window": config.sliding_window,
            "max_window_layers": config.num_layers,
            "dflash_config": {
                "block_size": config.block_size,
                "mask_token_id": chosen_mask_token(config.mask_token_id, target),
                "target_layer_ids": list(block_layers(config, target)),
                "num_target_layers": target.num_layers,
            },
            "colospec": {"num_anchors": config.num_anchors},
        }

    def read_config(self, contents: dict[str, Any]) -> DraftConfig:
        if kind := (contents.get("dflash_config") or {}).get("projector_type"):
            raise ValueError(f"projector_type={kind} is a variant of DFlash that is not known here")
        return DFlashConfig(**self.settings(contents))

    def settings(self, contents: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that all drafters of blocks have in config.json, by name."""
        contents = self.facts(contents)
        inner = contents.get("dflash_config") or {}
        layers = inner.get("target_layer_ids", contents.get("target_layer_ids"))
        mask = inner.get("mask_token_id", contents.get("mask_token_id"))
        size = inner.get("block_size") or contents.get("block_size")
        if layers is None or mask is None or size is None:
            raise ValueError("target_layer_ids, mask_token_id or block_size is missing")
        types = contents.get("layer_types") or []
        _check_attention(contents, types)
        sliding = [layer for layer, kind in enumerate(types) if kind == SLIDING]
        return {
            "aux_layer_ids": list(layers),
            "num_layers": contents["num_hidden_layers"],
            "block_size": size,
            "mask_token_id": mask,
            "num_anchors": contents.get("colospec", {}).get("num_anchors", BlockConfig.num_anchors),
            "intermediate_size": contents.get("intermediate_size"),
            "sliding_window": contents.get("sliding_window") if sliding else None,
            "sliding_layers": sliding,
        }

    def facts(self, contents: dict[str, Any]) -> dict[str, Any]:
        # Some trainers give the number of aux layers by the name that is the target's depth.
        depth = contents.get("target_num_hidden_layers", contents.get("num_target_layers"))
        return contents | ({} if depth is None else {"num_target_layers": depth})

    def target_facts(self, target: Target) -> dict[str, Any]:
        return layer_facts(target) | {"num_target_layers": target.num_layers}

    def inputs(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, BlockConfig)
        return {
            "aux_layer_ids": block_layers(config, target),
            "mask_token_id": chosen_mask_token(config.mask_token_id, target),
            "sliding_layers": config.sliding_layers,
            "sliding_window": config.sliding_window,
        }

    def tensor_name(self, name: str) -> str | None:
        name = name.removeprefix("model.")
        if name in TARGETS_OWN or name == "lm_head.weight":
            return None
        first, dot, rest = name.partition(".")
        return _OTHER_NAMES.get(first, first) + dot + rest

    def sglang_arguments(self, config: DraftConfig, chain_length: int) -> dict[str, Any]:
        assert isinstance(config, DFlashConfig)
        if chain_length != config.block_size - 1:
            raise ValueError(
                f"SGLang verifies whole blocks, and this draft's are of {config.block_size} "
                f"tokens with the given one: --chain-length {config.block_size - 1}, not "
                f"{chain_length}"
            )
        return {
            "speculative_algorithm": "DFLASH",
            "speculative_num_draft_tokens": config.block_size,
        }

    def card(self, contents: dict[str, Any]) -> CardText:
        kinds = set(contents["layer_types"])
        mixed = ", with VLLM_USE_V2_MODEL_RUNNER=1" if len(kinds) > 1 else ""
        size = contents["block_size"]
        serve = _SERVE.format(block_size=size, mixed=mixed, vllm=vllm_command("dflash", size - 1))
        return CardText("DFlash", "dflash", self.rows(contents), serve)

    def rows(self, contents: dict[str, Any]) -> dict[str, str]:
        """Return the card's facts of a config.json."""
        inner = contents.get("dflash_config", contents)
        return {
            "layers": str(contents["num_hidden_layers"]),
            "block": f"{contents['block_size']} tokens, the first one given",
            "mask token": str(inner["mask_token_id"]),
            "aux layers of the target": ", ".join(map(str, inner["target_layer_ids"])),
        }


def _check_attention(contents: dict[str, Any], types: list[str]) -> None:
    """Raise ValueError for attention that is not ours: full layers see their whole block, sliding
    ones are causal in it, and both share heads as usual."""
    inner = contents.get("dflash_config") or {}
    causal = contents.get("is_causal", inner.get("causal"))
    for layer in range(contents["num_hidden_layers"]):
        own = layer < len(types) and types[layer] == SLIDING
        if causal is not None and bool(causal) != own:
            raise ValueError(
                f"causal={causal} for layer {layer}, a {'sliding' if own else 'full'} one: full "
                "layers are bidirectional here, and sliding ones causal"
            )
    if inner.get("use_swa") and SLIDING not in types:
        raise ValueError("use_swa=true without layer_types is not known here")
    if (mode := inner.get("attention_mode", "gqa")) not in ("gqa", "mha"):
        raise ValueError(f"attention_mode={mode} is not known here")
