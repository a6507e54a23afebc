"""The workloads of bench_colocate.py: settings, lengths of samples, and the data made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir

from colospec import config
from colospec.config import RunConfig
from colospec.data import cache
from colospec.data.encode import Encoded
from colospec.draft import catalog

NUM_SAMPLES = 1024
MEAN_LENGTH = 850
TINY_TARGET = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "dtype": "float32", "rms_norm_eps": 1e-6,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One workload: settings for a number of GPUs, the lengths of its samples, and how many tokens
    of each are supervised: one stretch at a random place; None is all of them."""

    overrides: Callable[[int], list[str]]
    lengths: Callable[[np.random.Generator], np.ndarray]
    supervised: int | None = None


def _full(longest: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda _: np.full(NUM_SAMPLES, longest)


def _drawn(rng: np.random.Generator) -> np.ndarray:
    """Draw lengths from 64 to 2048 with a long tail and a mean of MEAN_LENGTH."""
    drawn = rng.gamma(2.0, 1.0, NUM_SAMPLES)
    for _ in range(50):
        drawn *= MEAN_LENGTH / drawn.clip(64, 2048).mean()
    return drawn.clip(64, 2048).astype(np.int64)


def _original(batch: int, *draft: str) -> Callable[[int], list[str]]:
    def overrides(num_gpus: int) -> list[str]:
        if batch % num_gpus:
            raise ValueError(f"{batch} samples per step do not divide over {num_gpus} GPUs")
        each = batch // num_gpus
        return [
            "target=qwen3_8b", *draft, *_all_blocks(each, *draft), "data.max_length=2048",
            f"data.token_budget={2048 * each}", f"data.max_sequences={each}",
        ]  # fmt: skip

    return overrides


def _four_samples(*draft: str) -> Callable[[int], list[str]]:
    return lambda _: [
        "target=qwen3_8b", *draft, *_all_blocks(4, *draft), "data.max_length=2048",
        "data.token_budget=8192", "data.max_sequences=4",
    ]  # fmt: skip


def _all_blocks(samples: int, *draft: str) -> list[str]:
    """Return the setting that lets all blocks of `samples` samples share a micro-batch."""
    return [f"draft.max_blocks={512 * samples}"] if "draft=dflash" in draft else []


FULL_VOCABULARY = "draft.draft_vocab_size=null"
TINY = ("data.max_length=64", "data.token_budget=256", "data.max_sequences=4")
CELLS = {
    "qwen3_8b": Cell(_four_samples(), _full(2048)),
    "original_2": Cell(_original(2, FULL_VOCABULARY), _drawn),
    "original_8": Cell(_original(8, FULL_VOCABULARY), _drawn),
    "dflash": Cell(_four_samples("draft=dflash"), _full(2048)),
    # 360 anchors, which is 70 % of 512.
    "dflash_70": Cell(_four_samples("draft=dflash"), _full(2048), supervised=361),
    "dflash_original_2": Cell(_original(2, "draft=dflash"), _drawn),
    "dflash_original_8": Cell(_original(8, "draft=dflash"), _drawn),
    "tiny": Cell(
        lambda _: [*TINY, "draft.ttt_length=3", "draft.draft_vocab_size=128"], _full(64)
    ),
    "tiny_dflash": Cell(
        lambda _: [
            *TINY, "draft=dflash", "draft.num_layers=2", "draft.num_anchors=16",
            "draft.block_size=4",
        ],
        _full(64),
        supervised=33,
    ),
}  # fmt: skip


def settings(overrides: list[str]) -> RunConfig:
    """Compose a run's settings as colospec.run would."""
    config.register()
    catalog.register()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        return config.load(compose("config", overrides=overrides))


def loss_mask(cell: Cell, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return which tokens of the samples, one after another, are supervised; bool."""
    if cell.supervised is None:
        return np.ones(int(lengths.sum()), np.bool_)
    masks = []
    for length in lengths.tolist():
        size = min(cell.supervised, length - 1)
        begin = rng.integers(1, length - size + 1)
        masks.append((np.arange(length) >= begin) & (np.arange(length) < begin + size))
    return np.concatenate(masks)


def write_dataset(directory: Path, lengths: np.ndarray, mask: np.ndarray, vocab_size: int) -> Path:
    """Write random tokens as the data step would."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, int(lengths.sum()), np.int32)
    encoded = Encoded(tokens, mask, lengths.astype(np.int64), [], 1.0)
    cache.build(directory / "data", [encoded], vocab_size=vocab_size)
    return directory / "data"
