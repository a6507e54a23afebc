"""Find the files of a dataset and read them in chunks of rows.

This process reads and cuts; parsing rows is left to those who tokenise: a chunk of JSON lines is
still bytes, a chunk of Parquet or Arrow still a serialised record batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from colospec.data.rows import COLUMNS, FIELDS, Rejected, drop_nulls, parse_json

CHUNK_BYTES = 256 * 1024
CHUNK_ROWS = 256
# Files of `datasets` and of the Hub that lie beside data and hold none.
NOT_DATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


@dataclass(frozen=True)
class Chunk:
    """Some rows of one file. Rows count from 1, as lines do in an editor.

    `lines` are lines of JSON, `rows` parsed objects, `table` an Arrow IPC stream; one of them is
    set. `share` is the part of the whole input's bytes that the chunk stands for.
    """

    file: str
    first_row: int
    share: float
    lines: list[bytes] | None = None
    rows: list[Any] | None = None
    table: bytes | None = None

    def parsed(self) -> Iterator[tuple[int, Any]]:
        """Yield row numbers and parsed rows (Rejected for bad JSON); blank lines are no rows."""
        if self.lines is not None:
            for number, line in enumerate(self.lines, self.first_row):
                if line.strip():
                    yield number, _parsed_or_rejected(line)
        elif self.rows is not None:
            yield from enumerate(self.rows, self.first_row)
        else:
            rows = pa.ipc.open_stream(self.table).read_all().to_pylist()
            yield from enumerate(map(drop_nulls, rows), self.first_row)


def _parsed_or_rejected(line: bytes) -> Any:
    try:
        return parse_json(line)
    except Rejected as rejected:
        return rejected


def find_files(path: Path, *, setting: str = "data.path") -> list[Path]:
    """Return the data files that `path`, the value of `setting`, stands for, in order.

    Raises ValueError for a missing path, an unknown kind of file, or a directory without data.
    """
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(
                f"{setting}={path} has the unknown extension {path.suffix!r}; "
                f"set {setting} to {_kinds()}"
            )
        return [path]
    if not path.is_dir():
        raise ValueError(f"{setting}={path} does not exist; set {setting} to {_kinds()}")
    if (path / "dataset_dict.json").is_file():
        path = path / _choose_split(path, setting)
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text())
        return [path / file["filename"] for file in state["_data_files"]]
    files = sorted(
        file for file in path.iterdir() if file.suffix in READERS and file.name not in NOT_DATA
    )
    if not files:
        raise ValueError(f"{setting}={path} holds no data; set {setting} to {_kinds()}")
    return files


class Unusable(Exception):
    """What is wrong with a file that can be read."""


def read_chunks(files: list[Path], *, setting: str = "data.path") -> Iterator[Chunk]:
    """Read all rows of all files, in order; raises ValueError for a file that cannot be read, of
    those that `setting` stands for."""
    total = sum(file.stat().st_size for file in files) or 1
    for file in files:
        try:
            yield from READERS[file.suffix](file, file.stat().st_size / total)
        except Unusable as fault:
            raise ValueError(f"{file} (of {setting}) {fault}") from fault
        except (pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file} (of {setting}) is not a readable {file.suffix} file: {error}; "
                "repair it, or remove it from the directory"
            ) from error


def _kinds() -> str:
    return (
        f"a {', '.join(READERS)} file, a directory of them (its subdirectories are not searched), "
        "or a directory saved with datasets' save_to_disk"
    )


def _choose_split(path: Path, setting: str) -> str:
    splits: list[str] = json.loads((path / "dataset_dict.json").read_text())["splits"]
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise ValueError(
        f"{setting}={path} has the splits {', '.join(splits)} and no train; "
        f"choose one, for example {setting}={path / splits[0]}"
    )


def _read_lines(file: Path, share: float) -> Iterator[Chunk]:
    size = file.stat().st_size or 1
    first_row = 1
    with file.open("rb") as stream:
        while lines := stream.readlines(CHUNK_BYTES):
            part = share * sum(map(len, lines)) / size
            yield Chunk(file.name, first_row, part, lines=lines)
            first_row += len(lines)


def _read_json(file: Path, share: float) -> Iterator[Chunk]:
    """Read an array, or an object whose `data` is one; also lines under the wrong name."""
    if _holds_lines(file):
        yield from _read_lines(file, share)
        return
    rows = json.loads(file.read_bytes())
    if isinstance(rows, dict):
        rows = rows.get("data", [rows])
    if not isinstance(rows, list):
        raise Unusable(
            "must hold a JSON array of rows or an object whose data is one; "
            "a file with one object per line is a .jsonl file"
        )
    for start in range(0, len(rows), CHUNK_ROWS):
        part = rows[start : start + CHUNK_ROWS]
        yield Chunk(file.name, start + 1, share * len(part) / len(rows), rows=part)


def _holds_lines(file: Path) -> bool:
    """Tell whether the first two lines that are not blank are objects of their own."""
    with file.open("rb") as stream:
        first = list(islice((line for line in stream if line.strip()), 2))
    try:
        return len(first) == 2 and all(isinstance(json.loads(line), dict) for line in first)
    except ValueError:
        return False


def _read_parquet(file: Path, share: float) -> Iterator[Chunk]:
    with pq.ParquetFile(file) as parquet:
        columns = _columns(parquet.schema_arrow)
        num_rows = parquet.metadata.num_rows or 1
        batches = parquet.iter_batches(CHUNK_ROWS, columns=columns)
        yield from _chunks(file, batches, share / num_rows)


def _read_arrow(file: Path, share: float) -> Iterator[Chunk]:
    """Read an Arrow stream (what `datasets` writes) or an Arrow file."""
    with pa.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
        table = table.select(_columns(table.schema))
        batches = table.to_batches(max_chunksize=CHUNK_ROWS)
        yield from _chunks(file, iter(batches), share / (table.num_rows or 1))


def _columns(schema: pa.Schema) -> list[str]:
    if not set(FIELDS) & set(schema.names):
        raise Unusable(
            f"has no column named {', '.join(FIELDS)}; "
            f"it has {', '.join(schema.names)}: rename the one with the chats"
        )
    return [name for name in COLUMNS if name in schema.names]


def _chunks(file: Path, batches: Iterator[pa.RecordBatch], row_share: float) -> Iterator[Chunk]:
    first_row = 1
    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        table = sink.getvalue().to_pybytes()
        yield Chunk(file.name, first_row, row_share * batch.num_rows, table=table)
        first_row += batch.num_rows


READERS: dict[str, Callable[[Path, float], Iterator[Chunk]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
