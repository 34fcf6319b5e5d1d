"""Lists of utterances in and out: manifests (audio and what is known about it) and transcripts, as JSON lines."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import Place, local_copy, parse_json, place, write_whole

KEY_BYTES = 200


@dataclass
class Utterance:
    """A line of a manifest: `audio` as a path from here, `text` if it is known, and every other field of the line."""

    key: str
    audio: Place
    text: str | None
    fields: dict[str, Any]


def check_key(key: object, where: str) -> str:
    """Refuse what cannot be the key of an utterance; `where` opens the message.

    A key becomes the name of a member of a tar, up to its first dot, so it may hold no dot and nothing of a path.

    Raises:
        UserError: saying what is wrong with it.
    """
    if not isinstance(key, str) or not key:
        raise UserError(f"{where}: the key must be text that is not empty, not {_shown(key)}")
    if any(character in "./\\" or not character.isprintable() for character in key) or key != key.strip():
        raise UserError(
            f"{where}: the key {_shown(key)} has a dot, a slash, an outer space or a control character; use letters, digits, - and _"
        )
    if len(key.encode()) > KEY_BYTES:
        raise UserError(f"{where}: the key {_shown(key)} is longer than {KEY_BYTES} bytes; shorten it")
    return key


def read_manifest(path: Place | str) -> Iterator[Utterance]:
    """Read a manifest: on each line a JSON object with `audio` (a path from the manifest's folder), and optionally `key`
    (else the name of the audio file, without its extension), `text` and anything else. Empty lines are passed over.

    Raises:
        UserError: naming the file and the line: not JSON, a key or path that is missing or wrong, a key that was there
            before; or when the file is missing or holds no utterance.
    """
    path = place(path)
    found = False
    for where, value, key in _unique(path, "manifest"):
        found = True
        audio, text = value.pop("audio", None), value.pop("text", None)
        if not isinstance(audio, str) or not audio or "\0" in audio:
            raise UserError(f"{where}: `audio` must be the path of a file, not {_shown(audio)}")
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: `text` must be text, not {_shown(text)}; leave it out when it is unknown")
        try:
            named = place(audio)
        except UserError as error:
            raise UserError(f"{where}: `audio`: {error}") from None
        # a path counts from the manifest's folder, also one in a store
        yield Utterance(key, path.parent / audio if named == Path(audio) else named, text, value)
    if not found:
        raise UserError(f"{path}: this manifest holds no utterances; write a line of JSON for each, with audio and key")


def read_transcripts(path: Place | str) -> dict[str, str]:
    """Read transcripts: on each line a JSON object with `key` and `text`; a manifest with text will do.

    Raises:
        UserError: naming the file and the line, as `read_manifest`.
    """
    return dict(_texts(place(path)))


class Transcripts:
    """The same for as many utterances as there may be: they lie in a temporary database that spills to the disk.

    Raises:
        UserError: as `read_transcripts`.
    """

    def __init__(self, path: Place | str) -> None:
        table = "CREATE TABLE texts (key TEXT PRIMARY KEY, text TEXT, nbest TEXT) WITHOUT ROWID"
        self._texts = _database(table).cursor()
        self._texts.executemany(
            "INSERT INTO texts VALUES (?, ?, ?)",
            ((key, value["text"], _nbest(value, where)) for where, value, key in _lines_with_text(place(path))),
        )

    def get(self, key: str) -> str | None:
        """The text of an utterance, if there is one."""
        found = self._texts.execute("SELECT text FROM texts WHERE key = ?", (key,)).fetchone()
        return found and found[0]

    def nbest(self, key: str) -> list[tuple[str, float]]:
        """The n-best list of an utterance as (text, score in nat), its text alone where the file holds no list, or nothing."""
        found = self._texts.execute("SELECT text, nbest FROM texts WHERE key = ?", (key,)).fetchone()
        if found is None:
            return []
        return [(text, score) for text, score in json.loads(found[1])] if found[1] else [(found[0], 0.0)]


def _nbest(value: dict[str, Any], where: str) -> str | None:
    """The field `nbest` of a line, a list of objects with text and score, as JSON; None where there is none."""
    if value.get("nbest") is None:
        return None
    match value["nbest"]:
        case [_, *_] as found if all(
            isinstance(one, dict)
            and isinstance(one.get("text"), str)
            and isinstance(one.get("score"), int | float)
            and not isinstance(one["score"], bool)
            for one in found
        ):
            return json.dumps([(one["text"], one["score"]) for one in found])
    raise UserError(
        f"{where}: `nbest` must be a list of objects with text and score, not {_shown(value['nbest'])}; "
        "write it with `asr-kd transcribe … nbest=8`"
    )


def _texts(path: Place) -> Iterator[tuple[str, str]]:
    for _, value, key in _lines_with_text(path):
        yield key, value["text"]


def _lines_with_text(path: Place) -> Iterator[tuple[str, dict[str, Any], str]]:
    for where, value, key in _unique(path, "file of transcripts"):
        if not isinstance(value.get("text"), str):
            raise UserError(f"{where}: `text` must be text, not {_shown(value.get('text'))}")
        yield where, value, key


def _database(table: str) -> sqlite3.Connection:
    """A temporary one, in memory while it is small."""
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute(table)
    return database


def write_transcripts(path: Place | str, texts: Iterable[tuple[str, str]]) -> None:
    """Write (key, text) pairs as JSON lines, whole or not at all."""
    with write_whole(path, "w") as file:
        for key, text in texts:
            file.write(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n")


def _unique(path: Place, what: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where, object without its key, and key of every line."""
    # the keys seen so far lie in a temporary database that spills to the disk: a manifest may have any length
    with contextlib.closing(_database("CREATE TABLE lines (key TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")) as seen:
        for number, value in _lines(path, what):
            where = f"{path}, line {number}"
            audio = value.get("audio")
            if "key" not in value and not (isinstance(audio, str) and audio):
                raise UserError(f"{where}: has neither `audio` nor `key`; add them, or remove the line")
            key = check_key(value.pop("key") if "key" in value else Path(str(audio)).stem, where)
            try:
                seen.execute("INSERT INTO lines VALUES (?, ?)", (key, number))
            except sqlite3.IntegrityError:
                first = seen.execute("SELECT line FROM lines WHERE key = ?", (key,)).fetchone()[0]
                raise UserError(f"{where}: the key {key} was there before, in line {first}; keys must differ") from None
            yield where, value, key


def _lines(path: Place, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with local_copy(path) as copy, open(copy, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    raise UserError(f"{path}, line {number}: not UTF-8 text; convert the file to UTF-8") from None
                if not text:
                    continue
                value = parse_json(text, f"{path}, line {number}")
                if not isinstance(value, dict):
                    raise UserError(f"{path}, line {number}: must be a JSON object {{…}}, not {_shown(value)}")
                try:
                    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
                except (ValueError, RecursionError):  # NaN, half a character (a lone surrogate), too deep
                    raise UserError(
                        f"{path}, line {number}: holds NaN, half a character or too deep JSON; mend or remove it"
                    ) from None
                yield number, value
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder where a {what} was expected") from None
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(
            f"{path}: this {what} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "…"
