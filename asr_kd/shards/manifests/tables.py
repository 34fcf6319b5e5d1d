"""Tables: Common Voice's TSV beside `clips/`, and `metadata.csv` or `.jsonl` of Hugging Face's audiofolder."""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Iterator
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import Place
from asr_kd.shards.manifest import BOUNDS, audio_place, database, json_object, shown, span_of, spilling, text_lines
from asr_kd.shards.manifests.entries import AUDIO, Entry, ending, files_below, stem, take_text

#: columns of a Common Voice table, and what they are called here; the others keep their names
COMMON_VOICE = {"client_id": "speaker", "accents": "accent", "locale": "language"}
#: files that say of an audiofolder what its files are
METADATA = ("metadata.csv", "metadata.jsonl")


def common_voice(path: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The clips of a table, which lie beside it in `clips/`.

    It raises UserError, naming the line, where a row has more or fewer cells than the table has columns, or no path.
    """
    clips = path.parent / "clips" if (path.parent / "clips").exists() else path.parent
    columns: list[str] = []
    for _, where, line in text_lines(path, "table"):
        cells = line.split("\t")  # its quotes are plain characters
        if not columns:
            columns = _differing(cells, where)
            continue
        if len(cells) != len(columns):
            raise UserError(f"{where}: has {len(cells)} cells for {len(columns)} columns; fix or remove it")
        row: dict[str, Any] = {name: cell for name, cell in zip(columns, cells, strict=True) if cell.strip()}
        name = row.pop("path", "")
        if not name:
            raise UserError(f"{where}: names no file in `path`; fix or remove it")
        text = take_text(row, where)
        fields = {COMMON_VOICE.get(column, column): cell for column, cell in row.items()}
        if not ending(name):  # of the first editions
            name += ".mp3"
        yield Entry(where, stem(name), audio_place(clips, name, where), text, fields, identity=name)


def audiofolder(path: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The files that metadata list: those of one file, or all of them below a folder. Bounds are honoured (`span_of`).

    It raises UserError, naming the line, where a row names no file, is no row, or has wrong bounds.
    """
    folder, names = path.parent, [path.name]
    if path.is_dir():
        folder, names = path, [name for name in files_below(path) if name.rpartition("/")[2] in METADATA]
    with contextlib.closing(database("files (name TEXT PRIMARY KEY)")) as listed, spilling():
        for name in names:
            above = name.rpartition("/")[0]
            for where, row in _rows(folder / name):
                file = row.pop("file_name", None)
                if not isinstance(file, str) or not file:
                    raise UserError(f"{where}: `file_name` must be the path of a file, not {shown(file)}")
                inner = f"{above}/{file}" if above else file
                listed.execute("INSERT OR IGNORE INTO files VALUES (?)", (inner,))
                text, span = take_text(row, where), span_of(row, where)
                bounds = f"-{round(1000 * span.start)}" if span.start else ""
                audio = audio_place(folder / above if above else folder, file, where)
                yield Entry(where, stem(inner) + bounds, audio, text, row, span, inner + bounds)
        for name in files_below(folder) if path.is_dir() else ():
            if ending(name) in AUDIO and not listed.execute("SELECT 1 FROM files WHERE name = ?", (name,)).fetchone():
                notes["audio files that no metadata name"] += 1


def _differing(columns: list[str], where: str) -> list[str]:
    """The names of the columns of a table; UserError when one stands twice."""
    if twice := next((name for name in columns if name and columns.count(name) > 1), None):
        raise UserError(f"{where}: the column {shown(twice)} stands twice; rename or remove one of them")
    return columns


def _rows(path: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """The words that name each row, and its cells; of a CSV, empty cells are left out and bounds are numbers."""
    where, begins = "", True
    columns: list[str] = []

    def lines() -> Iterator[str]:
        nonlocal where, begins
        for _, here, line in text_lines(path, "table"):
            where, begins = here if begins else where, False  # a cell in quotes may have several lines
            yield line + "\n"

    first = next(text_lines(path, "list of metadata"), None)
    if first and first[2].lstrip().startswith("{"):
        yield from ((where, json_object(line, where)) for _, where, line in text_lines(path, "list of metadata"))
        return
    reader = csv.reader(lines(), strict=True)
    while True:
        begins = True
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where}: is no row of a CSV ({error}); fix or remove it") from None
        if cells is None:
            return
        if not columns:
            columns = _differing(cells, where)
            continue
        if len(cells) != len(columns):
            raise UserError(f"{where}: has {len(cells)} cells for {len(columns)} columns; fix or remove it")
        row: dict[str, Any] = {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
        for name in row.keys() & set(BOUNDS):
            with contextlib.suppress(ValueError):
                row[name] = float(row[name])
        yield where, row
