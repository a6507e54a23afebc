"""The public DSpark format: config.json and the tensors that SGLang loads as `Qwen3DSparkModel`.

That of DFlash, with the heads' tensors, and with their settings at the top level of config.json.
Read are also the settings below `dflash_config`, where some trainers write them.
"""

from __future__ import annotations

from typing import Any

from colospec.config import DraftConfig
from colospec.draft.dflash.public import DFlashFormat
from colospec.draft.dspark.config import DSparkConfig, MarkovHeadType
from colospec.draft.public import CardText, Shapes, vllm_command
from colospec.target import Target

HEADS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)
_SERVE = """\
SGLang (0.5.17):

    python -m sglang.launch_server --model-path TARGET \\
        --speculative-algorithm DSPARK --speculative-draft-model-path DRAFT \\
        --speculative-dspark-block-size {block_size}
"""
_VLLM = "\nvLLM (0.33):\n\n"


class DSparkFormat(DFlashFormat):
    """SGLang's `Qwen3DSparkModel`."""

    architectures = ("Qwen3DSparkModel", "DSparkDraftModel")

    def tensor_shapes(self, config: DraftConfig, target: Target) -> Shapes:
        assert isinstance(config, DSparkConfig)
        hidden, rank, kind = target.hidden_size, config.markov_rank, config.markov_head_type
        shapes = super().tensor_shapes(config, target) | {
            "markov_head.markov_w1.weight": (target.vocab_size, rank),
            "markov_head.markov_w2.weight": (target.vocab_size, rank),
        }
        if kind is MarkovHeadType.gated:
            shapes["markov_head.gate_proj.weight"] = (rank, hidden + rank)
            shapes["markov_head.gate_proj.bias"] = (rank,)
        if kind is MarkovHeadType.rnn:
            shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + hidden)
            shapes["markov_head.joint_proj.bias"] = (3 * rank,)
        if config.enable_confidence_head:
            width = hidden + rank if config.confidence_head_with_markov else hidden
            shapes["confidence_head.proj.weight"] = (1, width)
            shapes["confidence_head.proj.bias"] = (1,)
        return shapes

    def config_fields(self, config: DraftConfig, target: Target) -> dict[str, Any]:
        assert isinstance(config, DSparkConfig)
        fields = super().config_fields(config, target)
        inner = fields["dflash_config"]
        return fields | {
            "target_layer_ids": inner["target_layer_ids"],
            "mask_token_id": inner["mask_token_id"],
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov_head_type.value,
            "enable_confidence_head": config.enable_confidence_head,
            "confidence_head_with_markov": config.confidence_head_with_markov,
        }

    def read_config(self, contents: dict[str, Any]) -> DSparkConfig:
        inner = contents.get("dflash_config") or {}
        heads = {key: contents[key] for key in HEADS if key in contents}
        heads = {key: inner[key] for key in HEADS if key in inner} | heads
        if "markov_head_type" in heads:
            heads["markov_head_type"] = MarkovHeadType(heads["markov_head_type"])
        return DSparkConfig(**self.settings(contents), **heads)

    def sglang_arguments(self, config: DraftConfig, chain_length: int) -> dict[str, Any]:
        assert isinstance(config, DSparkConfig)
        if chain_length != config.block_size:
            raise ValueError(
                f"SGLang verifies whole blocks, and this draft's propose {config.block_size} "
                f"tokens: --chain-length {config.block_size}, not {chain_length}"
            )
        return {
            "speculative_algorithm": "DSPARK",
            "speculative_dspark_block_size": config.block_size,
            "speculative_num_draft_tokens": config.block_size + 1,
        }

    def card(self, contents: dict[str, Any]) -> CardText:
        size, kind = contents["block_size"], contents["markov_head_type"]
        serve = _SERVE.format(block_size=size)
        # vLLM has no other kind of head.
        if kind == MarkovHeadType.vanilla.value:
            serve += _VLLM + vllm_command("dspark", size)
        return CardText("DSpark", "dspark", self.rows(contents), serve)

    def rows(self, contents: dict[str, Any]) -> dict[str, str]:
        return super().rows(contents) | {
            "block": f"{contents['block_size']} tokens are read, and as many drafted",
            "Markov head": f"{contents['markov_head_type']}, rank {contents['markov_rank']}",
            "confidence head": "yes" if contents["enable_confidence_head"] else "no",
        }
