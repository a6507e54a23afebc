"""Facts about the target model, read from its Hugging Face directory without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_ALSO_OUTSIDE = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
)
# Softcapping of Gemma 2, scales of Granite and Cohere.
_LOGIT_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@dataclass(frozen=True)
class Target:
    """What the rest of the job needs to know of the target.

    `hf_config` is the parsed config.json (the text part of a multimodal one).
    """

    path: Path
    hidden_size: int
    num_layers: int
    vocab_size: int
    dtype: torch.dtype
    hf_config: dict[str, Any]

    @classmethod
    def load(cls, path: Path | str, *, dtype: str = "auto") -> Target:
        """Read `path`/config.json.

        `dtype` "auto" takes the one that config.json names (bfloat16 if it names none).
        Raises ValueError for a directory that is not a model, naming what is missing.
        """
        path = Path(path)
        file = path / "config.json"
        if not file.is_file():
            raise ValueError(
                f"target.path={path} is not a Hugging Face model directory: no config.json in it; "
                "set target.path=/dir of a model saved with save_pretrained"
            )
        return cls.from_config(path, json.loads(file.read_text()), dtype=dtype)

    @classmethod
    def from_config(cls, path: Path, config: dict[str, Any], *, dtype: str = "auto") -> Target:
        """Build from a parsed config.json; raises ValueError naming keys that are missing."""
        # A multimodal config keeps some facts of its text part at the top.
        outer = {key: value for key, value in config.items() if key in _ALSO_OUTSIDE}
        text = {**outer, **config["text_config"]} if "text_config" in config else config
        keys = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
        if missing := [key for key in keys if key not in text]:
            raise ValueError(
                f"{path}/config.json lacks {', '.join(missing)}: "
                "colospec needs a decoder-only causal language model"
            )
        if dtype == "auto":
            dtype = text.get("dtype") or text.get("torch_dtype") or "bfloat16"
        return cls(
            path=path,
            hidden_size=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            vocab_size=text["vocab_size"],
            dtype=getattr(torch, dtype),
            hf_config=text,
        )

    @property
    def name(self) -> str:
        """What to call the model: its repository, if it lies in the Hugging Face cache."""
        repository = self.path.parent.parent.name
        if self.path.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/", 1)
        return self.path.name

    @property
    def num_attention_heads(self) -> int:
        return int(self.hf_config["num_attention_heads"])

    @property
    def num_key_value_heads(self) -> int:
        return int(self.hf_config.get("num_key_value_heads") or self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return int(self.hf_config.get("head_dim") or self.hidden_size // self.num_attention_heads)

    @property
    def intermediate_size(self) -> int:
        return int(self.hf_config.get("intermediate_size") or 4 * self.hidden_size)

    @property
    def rope_theta(self) -> float:
        rope = self.hf_config.get("rope_parameters") or {}
        return float(rope.get("rope_theta") or self.hf_config.get("rope_theta") or 10000.0)

    @property
    def tied(self) -> bool:
        return bool(self.hf_config.get("tie_word_embeddings", False))

    def load_embedding(self) -> Tensor:
        """Return the input embedding [V, H], in the file's dtype, on the CPU."""
        return self._load("embed_tokens.weight")

    def load_head(self) -> Tensor:
        """Return the output head [V, H]: `lm_head.weight`, or the embedding where tied."""
        return self._load("lm_head.weight", "embed_tokens.weight")

    def _load(self, *suffixes: str) -> Tensor:
        files = self._weight_files()
        for suffix in suffixes:
            names = [name for name in files if name == suffix or name.endswith("." + suffix)]
            if names:
                name = min(names, key=len)
                with safe_open(files[name], framework="pt") as weights:
                    return weights.get_tensor(name)  # type: ignore[no-any-return]
        raise ValueError(f"no tensor named *{' or *'.join(suffixes)} in {self.path}/*.safetensors")

    def require_plain_head(self) -> None:
        """Raise ValueError for a target whose logits are more than a product with its head: a
        draft would learn from wrong distributions."""
        changed = [f"{k}={self.hf_config[k]}" for k in _LOGIT_KEYS if self._changes_logits(k)]
        if any(name.endswith("lm_head.bias") for name in self._weight_files()):
            changed.append("an lm_head.bias")
        if changed:
            raise ValueError(
                f"{self.path} computes its logits with {', '.join(changed)}, which drafts cannot "
                "learn from yet; choose a target with a plain output head"
            )

    def _changes_logits(self, key: str) -> bool:
        return self.hf_config.get(key) not in (None, 1, 1.0)

    def _weight_files(self) -> dict[str, Path]:
        """Map every tensor name to its file."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: self.path / file for name, file in weight_map.items()}
        file = self.path / "model.safetensors"
        if not file.is_file():
            raise ValueError(f"no model.safetensors(.index.json) in {self.path}")
        with safe_open(file, framework="pt") as weights:
            return dict.fromkeys(weights.keys(), file)


def missing_files(path: Path) -> list[str]:
    """Return the files that a model directory lacks, as an interrupted download leaves it."""
    index = path / "model.safetensors.index.json"
    wanted = {"config.json", "model.safetensors"}
    if index.is_file():
        wanted = {"config.json", *json.loads(index.read_text())["weight_map"].values()}
    return sorted(name for name in wanted if not (path / name).is_file())
