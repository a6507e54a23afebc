"""The layout of vLLM's speculators library (0.9), which all its algorithms share.

config.json nests the settings of the draft's layers (`transformer_layer_config`) and says which
target verifies, and how. Layer j of the target means the input of layer j, counted from 0, so it is
one more than in colospec, where layer i means the output of layer i.
"""

from __future__ import annotations

from typing import Any, ClassVar

from colospec.config import ExportFormat
from colospec.draft.public import SPECULATORS_KEY, PublicFormat, vllm_command
from colospec.target import Target

VERSION = "0.9.0"
_ALONE = """\
vLLM (0.33), which finds the target by its name in config.json:

    vllm serve DRAFT

or, with a copy of the target and other settings:
"""


class SpeculatorsFormat(PublicFormat):
    """What the formats of all algorithms in this layout have in common; `kind` is the name of the
    algorithm there."""

    name = ExportFormat.speculators
    kind: ClassVar[str]

    def matches(self, contents: dict[str, Any]) -> bool:
        return contents.get(SPECULATORS_KEY) == self.kind


def speculators_fields(
    kind: str, target: Target, layer: dict[str, Any], *, num_tokens: int
) -> dict[str, Any]:
    """Return the fields of config.json that all algorithms have; `num_tokens` are drafted before
    the target verifies them."""
    return {
        SPECULATORS_KEY: kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": num_tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": _verifier(target),
                "architectures": list(target.hf_config.get("architectures") or ()),
            },
        },
        "transformer_layer_config": layer,
        "tie_word_embeddings": False,
    }


def serve_with_vllm(contents: dict[str, Any], method: str, num_tokens: int, **more: Any) -> str:
    """Return the card's commands: vLLM looks the target up only if it is named as a repository."""
    verifier = contents["speculators_config"]["verifier"]["name_or_path"]
    intro = "vLLM (0.33):\n" if verifier.startswith("/") else _ALONE
    return f"{intro}\n{vllm_command(method, num_tokens, **more)}"


def input_layers(layers: tuple[int, ...]) -> list[int]:
    """Translate our layers, named by their outputs, into layers named by their inputs."""
    return [layer + 1 for layer in layers]


def output_layers(layers: list[int] | None) -> list[int] | None:
    """Translate layers named by their inputs into ours. Raises ValueError for the embedding."""
    if layers is None:
        return None
    if min(layers, default=0) < 1:
        raise ValueError(f"layers {layers} include 0, the embedding, which no draft reads here")
    return [layer - 1 for layer in layers]


def _verifier(target: Target) -> str:
    """Return what engines can load: the repository, or where the directory is."""
    return target.name if "/" in target.name else str(target.path.resolve())
