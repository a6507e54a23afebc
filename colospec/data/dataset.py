"""The tokenised dataset: made once per machine, shared by all ranks through memory maps."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from colospec.batch import Cursor, TokenBatch
from colospec.config import DataConfig
from colospec.data import cache
from colospec.data.encode import Encoded, EncodeOptions
from colospec.data.parallel import choose_num_workers, encode_chunks
from colospec.data.read import find_files, read_chunks
from colospec.data.rows import Reason
from colospec.log import console

log = logging.getLogger(__name__)

REMEDIES = {
    Reason.bad_json: "repair the file: one JSON object per line",
    Reason.bad_row: "give each row messages, conversations or text",
    Reason.wrong_roles: "give conversations as the target's chat template wants them",
    Reason.no_exact_mask: "set data.last_turn_only=null, or mark the answers in the chat template "
    "with {% generation %}",
    Reason.outside_vocabulary: "this tokenizer is not the target's: correct target.path",
    Reason.too_long: "raise data.max_length (and data.token_budget)",
    Reason.nothing_supervised: "give rows with longer answers, or lower data.min_loss_tokens",
}
NUM_EXAMPLES = 3
Scalar = TypeVar("Scalar", bound=np.generic)


class Dataset:
    """Samples of tokens and loss masks.

    lengths, num_loss_tokens [N] int64: tokens of each sample, and how many are supervised;
    token_counts [V] int64: how often each token id is supervised; num_filtered: rows left out, by
    reason; fingerprint: equal if and only if tokens and masks were made from the same; directory:
    where it all lies.
    """

    def __init__(self, directory: Path, *, fingerprint: str) -> None:
        """Open tokenised data; raises RuntimeError if it is damaged."""
        manifest = cache.read_manifest(directory)
        self.directory = directory
        self.fingerprint = fingerprint
        self.num_filtered = manifest.num_filtered
        self.num_tokens = manifest.num_tokens
        self.token_counts = np.fromfile(directory / "token_counts.bin", np.int64)
        self.num_loss_tokens = np.fromfile(directory / "num_loss_tokens.bin", np.int64)
        self._offsets = np.fromfile(directory / "offsets.bin", np.int64)
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)
        self._tokens = _memory_map(directory / "tokens.bin", np.int32)
        self._mask_bits = _memory_map(directory / "mask.bin", np.uint8)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """Return token_ids [length] int64 and loss_mask [length] bool of one sample."""
        tokens, mask = self._sample(index)
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(mask)

    def batch(self, cursor: Cursor, sample_ids: Sequence[int]) -> TokenBatch:
        """Lay samples end to end as the micro-batch that `cursor` names; none make an empty one."""
        samples = [self._sample(index) for index in sample_ids]
        lengths = self.lengths[list(sample_ids)]
        borders = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        num_tokens = int(borders[-1])
        token_ids = np.empty(num_tokens, np.int64)
        loss_mask = np.empty(num_tokens, np.bool_)
        for start, (tokens, mask) in zip(borders, samples, strict=False):
            token_ids[start : start + len(tokens)] = tokens
            loss_mask[start : start + len(mask)] = mask
        return TokenBatch(
            cursor=cursor,
            sample_ids=tuple(sample_ids),
            token_ids=torch.from_numpy(token_ids),
            position_ids=torch.from_numpy(np.arange(num_tokens) - borders[:-1].repeat(lengths)),
            cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
            loss_mask=torch.from_numpy(loss_mask),
        )

    def _sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        first_byte = start // 8
        bits = np.unpackbits(self._mask_bits[first_byte : -(-end // 8)], bitorder="little")
        mask = bits[start - 8 * first_byte : end - 8 * first_byte].view(np.bool_)
        return self._tokens[start:end], mask


def prepare(
    config: DataConfig,
    *,
    tokenizer_path: Path,
    vocab_size: int,
    cache_dir: Path | None = None,
    progress: bool = False,
    setting: str = "data.path",
) -> Dataset:
    """Open the tokenised data of `config`, after making it if it is not there yet.

    Any number of processes may call this at once: one tokenises, with `config.num_workers`
    processes of its own, and the others wait. `tokenizer_path` is a Hugging Face directory;
    `vocab_size` is the target's; `setting` is what errors call `config.path`. Raises ValueError,
    naming the fix, for data, a tokenizer or a chat template that cannot be used, and where more
    than `config.max_filtered_fraction` of the rows had to be left out.
    """
    if config.path is None:
        raise ValueError(f"{setting} is not set; add {setting}=FILE")
    files = find_files(Path(config.path).expanduser(), setting=setting)
    options = EncodeOptions(
        vocab_size=vocab_size,
        max_length=config.max_length,
        last_turn_only=config.last_turn_only,
        min_loss_tokens=config.min_loss_tokens,
    )
    root = (cache_dir or Path(config.cache_dir or cache.default_root())).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    fingerprint = cache.fingerprint(files, tokenizer_path, options, root=root)
    directory = root / f"data-{fingerprint[:24]}"
    if not directory.exists():
        with cache.locked(root / f"{directory.name}.lock"):
            if not directory.exists():
                num_workers = choose_num_workers(
                    config.num_workers, sum(file.stat().st_size for file in files)
                )
                log.info("tokenising %s with %d processes", config.path, num_workers)
                encoded = encode_chunks(
                    read_chunks(files, setting=setting),
                    tokenizer_path,
                    options,
                    num_workers=num_workers,
                )
                cache.build(directory, _shown(encoded, progress), vocab_size=vocab_size)
    dataset = Dataset(directory, fingerprint=fingerprint)
    _check_filtered(dataset, config, setting)
    return dataset


def _memory_map(file: Path, dtype: type[Scalar]) -> NDArray[Scalar]:
    """Map a file; an empty one cannot be mapped and is an empty array."""
    if file.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")


def _shown(encoded: Iterable[Encoded], progress: bool) -> Iterator[Encoded]:
    """Pass chunks on, with a progress bar on the terminal if asked for."""
    if not progress:
        yield from encoded
        return
    columns = (TextColumn("tokenising"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tokenising", total=1.0)
        for chunk in encoded:
            yield chunk
            bar.advance(task, chunk.share)


def _check_filtered(dataset: Dataset, config: DataConfig, setting: str) -> None:
    """Raise ValueError if nothing is left, or more was left out than the config allows."""
    filtered = sum(dataset.num_filtered.values())
    rows = len(dataset) + filtered
    list_file = dataset.directory / "filtered.jsonl"
    if rows == 0:
        raise ValueError(f"{setting}={config.path} has no rows")
    if len(dataset) and filtered <= config.max_filtered_fraction * rows:
        if filtered:
            log.info(
                "left out %d of %d rows: %s; listed in %s",
                filtered, rows, describe(dataset.num_filtered), list_file,
            )  # fmt: skip
        return
    with list_file.open() as stream:
        examples = [json.loads(line) for line in islice(stream, NUM_EXAMPLES)]
    shown = [
        f"\n  {row['file']} row {row['row']}: {row['reason']}: {row['detail']}" for row in examples
    ]
    most = max(dataset.num_filtered, key=dataset.num_filtered.__getitem__)
    raise ValueError(
        f"{filtered} of {rows} rows of {setting}={config.path} cannot be trained on "
        f"({describe(dataset.num_filtered)}), and data.max_filtered_fraction="
        f"{config.max_filtered_fraction}; {REMEDIES[Reason(most)]}. The first of them:"
        f"{''.join(shown)}\nAll are in {list_file}"
    )


def describe(num_filtered: dict[str, int]) -> str:
    """Return counts by reason as text."""
    return ", ".join(f"{reason} {count}" for reason, count in num_filtered.items()) or "none"
