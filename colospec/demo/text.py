"""The demo's text: pieces of source files, and what the target writes itself."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from colospec.demo.once import build_once
from colospec.demo.recipe import (
    NUM_EVAL_ROWS,
    NUM_TRAIN_ROWS,
    NUM_WRITTEN_ROWS,
    PIECE_CHARS,
    WRITTEN_BATCH,
    WRITTEN_TEMPERATURE,
    WRITTEN_TOKENS,
    sources,
    version_directory,
)
from colospec.demo.target import ensure_target
from colospec.target import Target


@dataclass(frozen=True)
class DemoData:
    """JSON Lines files of `text` rows; the evaluation rows come from files held out of training."""

    train_path: Path
    eval_path: Path


def ensure_data(cache_dir: Path | str | None = None) -> DemoData:
    """Return the demo's data files, after writing them if they are not there yet."""
    path = version_directory(cache_dir) / "data"

    def build(directory: Path) -> None:
        train, held_out = sources()
        rng = random.Random(0)
        _write_rows(directory / "train.jsonl", train, NUM_TRAIN_ROWS, rng)
        _write_rows(directory / "eval.jsonl", held_out, NUM_EVAL_ROWS, rng)

    build_once(path, build, "the demo data")
    return DemoData(path / "train.jsonl", path / "eval.jsonl")


def ensure_written(cache_dir: Path | str | None = None) -> Path:
    """Return a JSON Lines file of `text` rows that the target wrote, after making it if it is not
    there yet: each continues the first tokens of a training row.

    A draft learns more from them than from the training text itself. Of that a target so small
    knows little, so most next tokens of the text are noise to whoever predicts the target.
    """
    recipe = (NUM_WRITTEN_ROWS, WRITTEN_BATCH, WRITTEN_TOKENS, WRITTEN_TEMPERATURE)
    version = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    path = version_directory(cache_dir) / f"written-{version}"

    def build(directory: Path) -> None:
        from colospec.data.encode import load_tokenizer
        from colospec.evaluate.continuation import continue_prompts

        target = Target.load(ensure_target(cache_dir))
        tokenizer = load_tokenizer(target.path)
        lines = ensure_data(cache_dir).train_path.read_text().splitlines()
        rows = tokenizer([json.loads(line)["text"] for line in lines])["input_ids"]
        given, num_tokens = WRITTEN_TOKENS
        prompts = [row[:given] for row in rows if len(row) >= given][:NUM_WRITTEN_ROWS]
        written = continue_prompts(
            target,
            torch.tensor(prompts),
            num_tokens=num_tokens,
            temperature=WRITTEN_TEMPERATURE,
            batch_size=WRITTEN_BATCH,
            seed=0,
            device=torch.device("cpu"),
        )
        with (directory / "train.jsonl").open("w") as out:
            for text in tokenizer.batch_decode(written, clean_up_tokenization_spaces=False):
                out.write(json.dumps({"text": text}) + "\n")

    build_once(path, build, "text that the demo target writes (half a minute, once per machine)")
    return path / "train.jsonl"


def _write_rows(path: Path, files: list[Path], number: int, rng: random.Random) -> None:
    """Write `number` pieces of the files, cut between lines, in random order."""
    pieces = [piece for file in files for piece in _pieces(file.read_text(errors="ignore"), rng)]
    rng.shuffle(pieces)
    with path.open("w") as out:
        out.writelines(json.dumps({"text": piece}) + "\n" for piece in pieces[:number])


def _pieces(text: str, rng: random.Random) -> Iterator[str]:
    piece, wanted = "", rng.randint(*PIECE_CHARS)
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= wanted:
            yield piece
            piece, wanted = "", rng.randint(*PIECE_CHARS)
