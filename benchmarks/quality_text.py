"""The text of bench_quality.py: what the machine has, a tokenizer of it, and its tokens.

Python sources and documentation of the interpreter, its packages and the system; equal files count
once. Files are held out as a whole, so no held-out line is trained on (though packages resemble
each other).
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

END = "<|endoftext|>"
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
FILE_BYTES = (512, 400_000)


@dataclass(frozen=True)
class Texts:
    """Contents of files in random order: for training, and held out."""

    train: list[str]
    held_out: list[str]


def collect(*, max_bytes: int, held_out_share: float = 0.02) -> Texts:
    """Read text files of this machine, at most `max_bytes` of them in all."""
    files = sorted({file for root in _roots() for file in _files(root)})
    random.Random(0).shuffle(files)
    texts, seen, total = [], set(), 0
    for file in files:
        content = _read(file)
        digest = hashlib.sha256(content.encode()).digest()
        if content and digest not in seen:
            seen.add(digest)
            texts.append(content)
            total += len(content)
        if total >= max_bytes:
            break
    cut = max(8, int(held_out_share * len(texts)))
    if len(texts) < 4 * cut:
        raise RuntimeError(f"only {len(texts)} text files were found in {_roots()}")
    return Texts(train=texts[cut:], held_out=texts[:cut])


def train_tokenizer(texts: list[str], *, vocab_size: int, num_bytes: int) -> Any:
    """Return a byte-level BPE tokenizer, trained on the first `num_bytes` of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts, num_bytes), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def encode(tokenizer: Any, texts: list[str]) -> Tensor:
    """Return all texts as one row of tokens [N] int32, each text ended by END."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    rows = []
    for first in range(0, len(texts), 2048):
        part = [text + END for text in texts[first : first + 2048]]
        for row in tokenizer.backend_tokenizer.encode_batch_fast(part):
            rows.append(torch.tensor(row.ids, dtype=torch.int32))
    return torch.cat(rows)


def windows(tokens: Tensor, number: int, length: int, *, seed: int) -> Tensor:
    """Return `number` windows [number, length] of `tokens` [N], at random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (number, 1), generator=generator)
    return tokens[starts + torch.arange(length)].long()


def _roots() -> list[Path]:
    """Return the directories that hold text, none inside another of them."""
    paths = sysconfig.get_paths()
    wanted = [paths["stdlib"], paths["purelib"], *sys.path[1:], "/usr/lib/python3", "/usr/share"]
    roots = sorted({Path(path).resolve() for path in wanted if path and Path(path).is_dir()})
    own = Path(__file__).resolve().parent.parent
    return [
        root
        for root in roots
        if root != own and not any(other in root.parents for other in roots)
    ]  # fmt: skip


def _files(root: Path) -> list[Path]:
    found = []
    for directory, _, names in os.walk(root):
        found += [Path(directory, name) for name in names if name.endswith(SUFFIXES)]
    return found


def _read(file: Path) -> str:
    """Return the content, or nothing for what is no text of a fitting size."""
    try:
        if not FILE_BYTES[0] <= file.stat().st_size <= FILE_BYTES[1]:
            return ""
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _first(texts: list[str], num_bytes: int) -> list[str]:
    taken, total = [], 0
    for text in texts:
        taken.append(text)
        total += len(text)
        if total >= num_bytes:
            break
    return taken
