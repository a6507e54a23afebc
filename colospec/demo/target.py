"""The demo's target: a tokenizer and a small model in a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colospec.demo.once import build_once
from colospec.demo.recipe import (
    CHAT_TEMPLATE,
    NUM_STEPS,
    NUM_TOKENIZER_FILES,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    qwen3_config,
    sources,
    version_directory,
)
from colospec.demo.training import train_model


def target_config() -> dict[str, Any]:
    """Return the target's config.json, as known without building it."""
    return dict(qwen3_config().to_dict())


def target_directory(cache_dir: Path | str | None = None) -> Path:
    """Return where the target is, or will be, for this version of the recipe and of Python."""
    return version_directory(cache_dir) / "target"


def is_built(cache_dir: Path | str | None = None) -> bool:
    """Tell whether `ensure_target` would return at once."""
    return target_directory(cache_dir).is_dir()


def ensure_target(cache_dir: Path | str | None = None, *, num_steps: int = NUM_STEPS) -> Path:
    """Return the directory of the demo target, after building it if it is not there yet.

    Processes that ask at the same time wait for the one that builds. Training stops after
    `num_steps`, or MAX_SECONDS if the machine is too slow for that.
    """
    path = target_directory(cache_dir)

    def build(directory: Path) -> None:
        from transformers.utils import logging as transformers_logging

        train, held_out = sources()
        tokenizer = _train_tokenizer(train[:NUM_TOKENIZER_FILES])
        tokenizer.save_pretrained(directory)
        transformers_logging.disable_progress_bar()
        model = train_model(_encode(tokenizer, train), _encode(tokenizer, held_out), num_steps)
        model.save_pretrained(directory)

    build_once(path, build, "the demo target (about a minute, once per machine)")
    return path


def _train_tokenizer(files: list[Path]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    end, _, end_of_turn = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, extra_special_tokens=[end_of_turn]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _encode(tokenizer: Any, files: list[Path]) -> Tensor:
    """Return all files as one row of tokens [N], each file ended by <|endoftext|>."""
    texts = [file.read_text(errors="ignore") + SPECIAL_TOKENS[0] for file in files]
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for row in rows for token in row.ids])
