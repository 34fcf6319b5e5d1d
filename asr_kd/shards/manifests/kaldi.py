"""Kaldi's data folders: `wav.scp`, and `segments`, `text`, `utt2spk` and others beside it, joined by their ids."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import Place
from asr_kd.shards.manifest import LATEST, Span, audio_place, database, spilling, text_lines
from asr_kd.shards.manifests.entries import Entry, root_of, words

SCP, SEGMENTS, TEXT, SPEAKERS = "wav.scp", "segments", "text", "utt2spk"
#: other files that are read, by utterance and by speaker, and the fields that they become
BY_UTTERANCE = {"utt2lang": "language", "utt2gender": "gender", "utt2age": "age"}
BY_SPEAKER = {"spk2gender": "gender", "spk2age": "age"}
#: all that is read of a folder
FILES = (SCP, SEGMENTS, TEXT, SPEAKERS, *BY_UTTERANCE, *BY_SPEAKER)
_FIX = "fix the folder: utils/fix_data_dir.sh"


def entries(folder: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The segments of a data folder, or its recordings where it has no `segments`, in the order of the file.

    The files are joined in a temporary database that spills to the disk.

    Raises:
        UserError: naming file and line: a pipe or an archive, a line that is none of such a file, an id that stands twice
            or has no audio.
    """
    table = "rows (file TEXT, id TEXT, value TEXT, line INTEGER, PRIMARY KEY (file, id))"
    with contextlib.closing(database(table)) as rows, spilling():
        there = [name for name in FILES if (folder / name).exists()]
        for name in there:
            _load(rows, folder, name)
        listed = SEGMENTS if SEGMENTS in there else SCP
        for name in (TEXT, SPEAKERS):
            _refuse_without_audio(rows, folder, name, listed)
        if listed == SEGMENTS:
            of_segments = "SELECT value FROM rows WHERE file = 'segments'"
            unused = f"SELECT COUNT(*) FROM rows WHERE file = 'wav.scp' AND id NOT IN ({of_segments})"
            notes["recordings without a segment"] += rows.execute(unused).fetchone()[0]
        root = None
        for _, where, line in text_lines(folder / listed, listed):
            key, recording, span = _segment(line, where) if listed == SEGMENTS else (words(line, 1)[0], words(line, 1)[0], Span())  # fmt: skip
            path, number = _row(rows, SCP, recording) or ("", 0)
            if not number:
                raise UserError(f"{where}: the recording {recording} is not in {SCP}; {_FIX}")
            scp = f"{folder / SCP}, line {number}"
            _check_path(path, scp)
            root = root or root_of(folder, path)
            text = (_row(rows, TEXT, key) or (None,))[0]
            fields = _fields(rows, key, there)
            if listed == SEGMENTS:
                fields["recording"] = recording
            yield Entry(where, key, audio_place(root, path, scp), text, fields, span)


def _load(rows: sqlite3.Connection, folder: Place, name: str) -> None:
    for number, where, line in text_lines(folder / name, name):
        key, *rest = words(line, 1)
        value = rest[0] if rest else ""
        if name == SEGMENTS:
            value = _segment(line, where)[1]
        elif not value and name != TEXT:
            raise UserError(f"{where}: nothing stands behind {key}; {_FIX}")
        try:
            rows.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (name, key, value, number))
        except sqlite3.IntegrityError:
            first = (_row(rows, name, key) or ("", 0))[1]
            raise UserError(f"{where}: {key} was there before, in line {first}; remove one of them") from None


def _row(rows: sqlite3.Connection, file: str, key: str) -> tuple[str, int] | None:
    """What stands behind an id in a file, and the number of its line."""
    found: tuple[str, int] | None = rows.execute(
        "SELECT value, line FROM rows WHERE file = ? AND id = ?", (file, key)
    ).fetchone()
    return found


def _refuse_without_audio(rows: sqlite3.Connection, folder: Place, name: str, listed: str) -> None:
    query = "SELECT id, line FROM rows WHERE file = ? AND id NOT IN (SELECT id FROM rows WHERE file = ?) ORDER BY line LIMIT 1"
    for key, line in rows.execute(query, (name, listed)):
        raise UserError(f"{folder / name}, line {line}: {key} is not in {listed}, so it has no audio; {_FIX}")


def _segment(line: str, where: str) -> tuple[str, str, Span]:
    """Utterance, recording and bounds of a line of `segments`; an end below 0 is the recording's."""
    parts = words(line)
    try:
        start, end = (float(part) for part in parts[2:4])
        if len(parts) not in (4, 5) or not (abs(start) < LATEST and abs(end) < LATEST):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{where}: must be an utterance, its recording, and start and end in seconds, not {line.strip()[:60]!a}"
        ) from None
    return parts[0], parts[1], Span(start, None if end < 0 else end)


def _check_path(path: str, where: str) -> None:
    """Refuse what is not a plain file."""
    remedy = "write the audio into files and name those: wav-copy, or the command of the line with its output in a file"
    if path.endswith("|"):
        raise UserError(f"{where}: is a command (a pipe), and data runs no commands here; {remedy}")
    if re.search(r"\.ark(\.gz)?:\d+(\[.*\])?$", path):
        raise UserError(f"{where}: lies in an archive of Kaldi; {remedy}")
    if path == "-":
        raise UserError(f"{where}: is standard input; {remedy}")


def _fields(rows: sqlite3.Connection, key: str, there: list[str]) -> dict[str, Any]:
    """What the files that are there say of an utterance and of its speaker."""
    speaker = (_row(rows, SPEAKERS, key) or ("",))[0]
    fields: dict[str, Any] = {"speaker": speaker} if speaker else {}
    for table, one in ((BY_SPEAKER, speaker), (BY_UTTERANCE, key)):
        for file in table.keys() & set(there):
            if found := _row(rows, file, one):
                fields[table[file]] = found[0]
    return fields
