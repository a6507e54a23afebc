"""Tokenised data on disk: a directory per fingerprint, built once and opened by memory map.

    data-<fingerprint>/
      tokens.bin           int32 [T], all samples end to end
      offsets.bin          int64 [N + 1], where each sample starts in tokens.bin
      mask.bin             uint8 [ceil(T / 8)], bit t % 8 of byte t // 8: token t is supervised
      num_loss_tokens.bin  int64 [N], supervised tokens of each sample
      token_counts.bin     int64 [V], how often each token id is supervised
      filtered.jsonl       the rows that were left out: file, row, reason, detail
      manifest.json        counts; written last

The files are written to a directory of another name, which is renamed when all is on disk. A lock
makes one process build while others wait; the kernel lets go of it when its holder dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from colospec.data.encode import Encoded, EncodeOptions
from colospec.durable import TEMPORARY, publish

log = logging.getLogger(__name__)

# Raise it with any change to the rows that are read, their tokens or masks, or the files' format.
PARSER_VERSION = 1
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "chat_template*")
# A file younger than this may change again without a new time stamp.
SETTLED_S = 2.0


@dataclass(frozen=True)
class Manifest:
    """What a directory of tokenised data holds."""

    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    num_filtered: dict[str, int]
    vocab_size: int


def default_root() -> Path:
    """Return $XDG_CACHE_HOME/colospec."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colospec"


def fingerprint(
    files: list[Path], tokenizer_path: Path, options: EncodeOptions, *, root: Path
) -> str:
    """Return a sha256 over all that decides the tokenised data; names and places do not count.

    The hash of a large file is kept under `root`, by the file's identity.
    """
    tokenizer_files = sorted(
        {file for glob in TOKENIZER_FILES for file in tokenizer_path.glob(glob) if file.is_file()}
        | set(tokenizer_path.glob("additional_chat_templates/*"))
    )
    facts = {
        "parser": PARSER_VERSION,
        "options": asdict(options),
        "tokenizer": [[file.name, _file_hash(file, root)] for file in tokenizer_files],
        "data": [[file.suffix, _file_hash(file, root)] for file in files],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _file_hash(file: Path, root: Path) -> str:
    """Return the sha256 of a file's content, remembered as long as the file stays the same."""
    stat = file.stat()
    identity = [
        str(file.resolve()),
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    known = root / "sha256" / key
    # The memo only saves time: a cache may belong to another user, or its disk be full.
    with suppress(OSError):
        return known.read_text()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_S:
        with suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            temporary = known.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
            temporary.write_text(digest)
            temporary.replace(known)
    return digest


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; while waiting for it, say who holds it.

    Raises RuntimeError where the file cannot be written or locked.
    """
    with _open_lock(path) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read() or "another process"
            log.info("waiting for %s to tokenise the data (%s)", holder, path)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise RuntimeError(
                f"cannot lock {path}: {error}; set data.cache_dir to a file system with locks"
            ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def _open_lock(path: Path) -> TextIO:
    try:
        return path.open("a+")
    except OSError as error:
        raise RuntimeError(
            f"the data is not tokenised yet, and {path} cannot be written: {error}; set "
            "data.cache_dir to a directory where you may write, or let its owner tokenise the data"
        ) from error


def build(target: Path, samples: Iterable[Encoded], *, vocab_size: int) -> None:
    """Write tokenised data and let it appear as the directory `target` when it is complete.

    The caller holds the lock; what an earlier, killed process left unfinished is thrown away.
    """
    temporary = target.with_name(target.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, samples, vocab_size)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish(temporary, target)


def _write(directory: Path, samples: Iterable[Encoded], vocab_size: int) -> None:
    lengths = [np.zeros(1, np.int64)]
    num_loss_tokens = [np.empty(0, np.int64)]
    token_counts = np.zeros(vocab_size, np.int64)
    num_filtered: Counter[str] = Counter()
    carried = np.empty(0, np.bool_)  # mask bits that do not fill a byte yet
    with ExitStack() as stack:
        tokens_file, mask_file = (
            stack.enter_context((directory / name).open("wb"))
            for name in ("tokens.bin", "mask.bin")
        )
        filtered_file = stack.enter_context((directory / "filtered.jsonl").open("w"))
        for encoded in samples:
            tokens_file.write(encoded.tokens.tobytes())
            bits = np.concatenate([carried, encoded.loss_mask])
            whole = len(bits) // 8 * 8
            mask_file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
            carried = bits[whole:]
            lengths.append(encoded.lengths)
            num_loss_tokens.append(_count_by_sample(encoded))
            token_counts += np.bincount(encoded.tokens[encoded.loss_mask], minlength=vocab_size)
            for row in encoded.filtered:
                num_filtered[row.reason.value] += 1
                filtered_file.write(json.dumps(asdict(row)) + "\n")
        mask_file.write(np.packbits(carried, bitorder="little").tobytes())
    offsets = np.concatenate(lengths).cumsum()
    loss_tokens = np.concatenate(num_loss_tokens)
    offsets.tofile(directory / "offsets.bin")
    loss_tokens.tofile(directory / "num_loss_tokens.bin")
    token_counts.tofile(directory / "token_counts.bin")
    manifest = Manifest(
        num_samples=len(loss_tokens),
        num_tokens=int(offsets[-1]),
        num_loss_tokens=int(loss_tokens.sum()),
        num_filtered=dict(num_filtered.most_common()),
        vocab_size=vocab_size,
    )
    (directory / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def _count_by_sample(encoded: Encoded) -> NDArray[np.int64]:
    """Count the supervised tokens [N] of each sample."""
    before = np.concatenate([np.zeros(1, np.int64), encoded.loss_mask.cumsum(dtype=np.int64)])
    ends = encoded.lengths.cumsum()
    counts: NDArray[np.int64] = before[ends] - before[ends - encoded.lengths]
    return counts


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest; raises RuntimeError where the files are not of the sizes it tells."""
    manifest = Manifest(**json.loads((directory / "manifest.json").read_text()))
    samples, tokens = manifest.num_samples, manifest.num_tokens
    sizes = {
        "tokens.bin": 4 * tokens,
        "offsets.bin": 8 * (samples + 1),
        "mask.bin": -(-tokens // 8),
        "num_loss_tokens.bin": 8 * samples,
        "token_counts.bin": 8 * manifest.vocab_size,
    }
    for name, size in sizes.items():
        actual = (directory / name).stat().st_size
        if actual != size:
            raise RuntimeError(
                f"{directory / name} has {actual} bytes instead of {size}: the tokenised data is "
                f"damaged; delete {directory}, and it is made anew"
            )
    return manifest
