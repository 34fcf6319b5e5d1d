"""Parquet with embedded audio, as datasets of Hugging Face have it; needs the extra `asr-kd[parquet]`."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_kd.errors import AudioError, UserError
from asr_kd.files import Place
from asr_kd.shards.manifest import shown
from asr_kd.shards.manifests.entries import Embedded, Entry, ending, files_below, stem, take_text

#: columns that name a row; the first that is there
IDS = ("id", "key", "utt_id", "utterance_id", "segment_id")
#: names of columns of bytes alone
_BARE = ("audio", "bytes", "audio_bytes")
#: rows whose audio, and rows whose other cells are in memory at once
AUDIO_ROWS, ROWS = 16, 1000


@dataclass(frozen=True)
class Cell(Embedded):
    """The bytes in a column of a row of a group of rows."""

    column: str
    group: int
    row: int

    def read_bytes(self, size: int | None = None, start: int = 0) -> bytes:
        file = str(self.container)
        with _readable(Path(file)):
            found = os.stat(file)
        data = _group(file, self.column, self.group, (found.st_size, found.st_mtime_ns)).read(self.row)
        if data is None:
            raise AudioError(
                f"{self}: holds no audio, only a path or nothing; make the dataset again with embedded audio"
            )
        return data[start : None if size is None else start + size]


def entries(path: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The rows of a file, or of all files below a folder. Their audio is read later, cell by cell.

    Raises:
        UserError: when the extra is missing, a folder holds several splits, or a file is damaged or has no audio.
    """
    if not isinstance(path, Path):
        raise UserError(f"{path}: Parquet is read from a local disk; copy it here first")
    for file in _files(path):
        with _readable(file):
            opened = _opened(file)
            column, names = _audio_column(opened, file), opened.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{file}: the column {shown(twice)} stands twice; rename or remove one of them")
            others = [one for one in map(_path, opened.schema) if one != column]
            for group in range(opened.num_row_groups):
                first = 0
                for batch in opened.iter_batches(ROWS, row_groups=[group], columns=others):
                    rows = _in_microseconds(batch).to_pylist()
                    for row, values in enumerate(rows or [{}] * batch.num_rows, first):
                        cell = Cell("parquet", f"group {group}, row {row}", file, column, group, row)
                        yield _entry(values, cell, column.partition(".")[0])
                    first += batch.num_rows


def _entry(values: dict[str, Any], cell: Cell, audio: str) -> Entry:
    name = next((str(values[name]) for name in IDS if isinstance(values.get(name), str | int)), "")
    inner = values.pop(audio, None)
    path = inner.get("path") if isinstance(inner, dict) else None
    name = name or (stem(path) if path else f"{cell.container.stem}-{cell.group}-{cell.row}")
    fields = {key: _plain(value) for key, value in values.items() if not isinstance(value, bytes)}
    return Entry(str(cell), name, cell, take_text(fields, str(cell)), fields)


def _in_microseconds(batch: Any) -> Any:
    """Times of a batch as Python has them, without their nanoseconds."""
    arrow = importlib.import_module("pyarrow")
    for index, column in enumerate(batch.schema):
        if getattr(column.type, "unit", "") == "ns":
            zone = {"tz": column.type.tz} if arrow.types.is_timestamp(column.type) else {}
            kind = next(name for name in ("timestamp", "time64", "duration") if str(column.type).startswith(name))
            rounded = batch.column(index).cast(getattr(arrow, kind)("us", **zone), safe=False)
            batch = batch.set_column(index, column.name, rounded)
    return batch


def _plain(value: Any) -> Any:
    """A cell as JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items() if not isinstance(one, bytes)}
    if isinstance(value, list):
        return [_plain(one) for one in value if not isinstance(one, bytes)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int) else str(value)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    names = [name for name in files_below(path) if ending(name) == "parquet"]
    splits = sorted({re.sub(r"-\d+-of-\d+$", "", stem(name)) if "-of-" in name else name.rpartition("/")[0] for name in names})  # fmt: skip
    if len(splits) > 1:
        raise UserError(f"{path}: holds several splits ({', '.join(splits[:4])}); put the files of one into a folder of their own")  # fmt: skip
    return [path / name for name in names]


def _path(column: Any) -> str:
    return str(column.path)


def _audio_column(opened: Any, file: Path) -> str:
    """The column of the audio's bytes: `bytes` in a column of a struct, or a column of bytes alone."""
    columns = {_path(column): column.physical_type for column in opened.schema}
    found = [path for path in columns if path.endswith(".bytes") and path.count(".") == 1] or [
        path for path in _BARE if columns.get(path) == "BYTE_ARRAY" and _is_bytes(opened, path)
    ]
    found = [path for path in found if path == "audio.bytes"] or found
    if len(found) != 1:
        what = (
            f"holds audio in several columns ({', '.join(found)})"
            if found
            else f"has no column with the bytes of audio files, only {', '.join(list(columns)[:8])}"
        )
        raise UserError(f"{file}: {what}; write it again with one, `audio`, as datasets of Hugging Face have it")
    return found[0]


def _is_bytes(opened: Any, name: str) -> bool:
    return "binary" in str(opened.schema_arrow.field(name).type)


class _Group:
    """The audio of a group of rows, read forwards; memory holds a few rows."""

    def __init__(self, file: Path, column: str, group: int) -> None:
        self._file, self._column, self._group = file, column, group
        self._begin()

    def _begin(self) -> None:
        opened = _opened(self._file)
        self._batches = opened.iter_batches(AUDIO_ROWS, row_groups=[self._group], columns=[self._column])
        self._first = 0
        self._cells: list[bytes | None] = []

    def read(self, row: int) -> bytes | None:
        with _readable(self._file):
            if row < self._first:
                self._begin()
            while row >= self._first + len(self._cells):
                self._first += len(self._cells)
                outer, _, inner = self._column.partition(".")
                column = next(self._batches).column(outer)
                self._cells = (column.field(inner) if inner else column).to_pylist()
        return self._cells[row - self._first]


@functools.lru_cache(1)
def _group(file: str, column: str, group: int, state: tuple[int, int]) -> _Group:
    """One at a time is kept, while its file stays as it is."""
    return _Group(Path(file), column, group)


def _opened(file: Path) -> Any:
    """A file, whose pages are compared with their checksums where it has any."""
    try:
        import pyarrow.parquet  # an optional extra
    except ImportError:
        raise UserError("Parquet needs the extra asr-kd[parquet]; pip install 'asr-kd[parquet]'") from None
    return pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, StopIteration) as error:  # pyarrow's errors are ValueErrors
        first = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise UserError(f"{file}: cannot be read as Parquet ({first.rstrip('.')}); fetch the file again") from None
