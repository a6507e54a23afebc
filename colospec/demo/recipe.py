"""What the demo is made of, and where it is kept."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import sysconfig
from pathlib import Path
from typing import Any

VOCAB_SIZE = 2048
NUM_STEPS = 400
MAX_SECONDS = 75.0
BATCH_SIZE = 8
WINDOW = 256
MATRIX_LEARNING_RATE = 0.03
LEARNING_RATE = 0.01
WARMUP_STEPS = 20
RACE_STEPS = 3
NUM_HELD_OUT_FILES = 40
NUM_TOKENIZER_FILES = 200
NUM_TRAIN_ROWS = 4000
NUM_EVAL_ROWS = 64
PIECE_CHARS = (300, 1000)
NUM_WRITTEN_ROWS = 1280
WRITTEN_BATCH = 640
WRITTEN_TOKENS = (16, 112)  # given, and written behind them
WRITTEN_TEMPERATURE = 0.7
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Folders that hold tables and grammars, and those that many systems leave out.
TABLES = ("encodings", "lib2to3", "pydoc_data")
OPTIONAL = ("ensurepip", "idlelib", "site-packages", "tkinter", "turtledemo")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def version_directory(cache_dir: Path | str | None) -> Path:
    """Return where all that is built by this version of the recipe and of Python is kept; None is
    the user's cache."""
    recipe = (
        qwen3_config().to_json_string(use_diff=False),
        (NUM_STEPS, BATCH_SIZE, WINDOW, MATRIX_LEARNING_RATE, LEARNING_RATE),
        (CHAT_TEMPLATE, SPECIAL_TOKENS, TABLES, OPTIONAL),
        (NUM_HELD_OUT_FILES, NUM_TOKENIZER_FILES, NUM_TRAIN_ROWS, NUM_EVAL_ROWS, PIECE_CHARS),
        platform.python_version(),
    )
    version = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    if cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_dir = Path(home) / "colospec"
    return Path(cache_dir) / f"demo-{version}"


def qwen3_config() -> Any:
    """Return the target's transformers config."""
    # Imported where it is used: every rank imports this module, few build the demo.
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )


def sources() -> tuple[list[Path], list[Path]]:
    """Return the standard library's files in a fixed random order: for training, and held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if _is_code(file.relative_to(root)))
    random.Random(0).shuffle(files)
    return files[NUM_HELD_OUT_FILES:], files[:NUM_HELD_OUT_FILES]


def _is_code(file: Path) -> bool:
    return not any("test" in part or part in TABLES + OPTIONAL for part in file.parts)
