"""Lists of utterances in and out: manifests (audio and what is known about it) and transcripts, as JSON lines."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import posixpath
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from asr_kd.errors import UserError
from asr_kd.files import Place, local_copy, parse_json, place, readable, write_whole
from asr_kd.objects import ObjectPath

KEY_BYTES = 200
#: fields that say, in seconds, where in a recording an utterance begins and ends, and how long it is: as NeMo, Lhotse, Kaldi's users and others name them
STARTS, ENDS, LENGTHS = ("offset", "start", "begin", "start_time", "begin_time"), ("end", "end_time"), ("duration",)
BOUNDS = (*STARTS, *ENDS, *LENGTHS)
#: seconds; no bound can be as large
LATEST = 1e9
#: seconds by which `end` may differ from start and `duration` together
ROUNDING = 0.05
#: other names of bounds, in whatever unit; and of lengths, which say something only behind a start
_PARTS = "((seg|segment|audio|utt|utterance|clip|chunk|speech|frame|sample|time)_)?"
_UNITS = "(_(at|time|timestamp|offset|ms|msec|millis|milliseconds|s|sec|secs|seconds|samples?|frames?))?"
_OTHER_BOUNDS = re.compile(f"{_PARTS}(start|begin|beg|onset|offset|end|stop|from|to|[tx]min|[tx]max|t[01]){_UNITS}")
_OTHER_LENGTHS = re.compile(f"{_PARTS}(duration|dur|length|seconds|num_frames|num_samples){_UNITS}")
_OTHER_PAIRS = ("segment", "timestamp", "timestamps", "span", "interval")
#: what others call `audio`, and `text`, and where they put the texts of several segments
OTHER_TEXTS = ("sentence", "transcript", "transcription", "normalized_text")
_PERHAPS_TEXTS = (
    "txt", "Text", "TEXT", "texts", "transcripts", "trans", "raw_text", "raw_transcription", "original_text", "reference", "ref_text", "utterance", "words",
)  # fmt: skip
_SEGMENTS = ("segments", "supervisions", "chunks")
OTHER_NAMES = (
    "audio_filepath", "audio_file", "audio_path", "wav", "wav_path", "wav_filename", "path", "file", "filename", "file_name", "recording", "recording_id",
)  # fmt: skip
_WANTED = 'this wants a JSON object on each line, such as {"audio": "a.wav", "text": "one two"}'
#: how texts begin that stand in the place of a file, and what they are
_OTHERS = {
    "version https://git-lfs": "a Git LFS pointer; fetch the file: git lfs pull",
    **dict.fromkeys(("<!doctype", "<html", "<?xml", "<error"), "a web page or XML, perhaps a server's error; fetch the file again"),
}  # fmt: skip
#: the first bytes of files that must be unpacked, what packed them, and what unpacks them
GZIP = b"\x1f\x8b"
_PACKED = (
    (GZIP, "gzip", "gunzip <"), (b"PK\3\4", "zip", "unzip -p"), (b"BZh", "bzip2", "bunzip2 <"), (b"\xfd7zXZ", "xz", "unxz <"), (b"(\xb5/\xfd", "Zstandard", "unzstd <"),
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """A stretch of a recording, in seconds: `end` None is the recording's end. The default is all of it."""

    start: float = 0.0
    end: float | None = None


@dataclass
class Utterance:
    """A line of a manifest: `audio` as a path from here, `text` if it is known, every other field, where in the recording it lies."""

    key: str
    audio: Place
    text: str | None
    fields: dict[str, Any]
    span: Span


def check_key(key: object, where: str) -> str:
    """Refuse what cannot be the key of an utterance, with a UserError that `where` opens.

    A key becomes the name of a member of a tar, up to its first dot, so it may hold no dot and nothing of a path.
    """
    if not isinstance(key, str) or not key:
        raise UserError(f"{where}: the key must be text that is not empty, not {shown(key)}")
    if any(map(forbidden, key)) or key != key.strip():
        raise UserError(
            f"{where}: the key {shown(key)} has a dot, a slash, an outer space or a control character; use letters, digits, - and _"
        )
    if len(key.encode()) > KEY_BYTES:
        raise UserError(f"{where}: the key {shown(key)} is longer than {KEY_BYTES} bytes; shorten it")
    return key


def read_manifest(path: Place | str, audio_field: str = "audio") -> Iterator[Utterance]:
    """Read a manifest: on each line a JSON object with `audio` (a path from the manifest's folder), and optionally `key`
    (else one is made, see `made_key`), `text`, the bounds of a segment (`span_of`) and anything else. Empty lines are passed over.
    The file may be packed by gzip; `audio_field` is what it calls `audio`.

    Raises:
        UserError: naming the file and the line: not JSON, a key or path that is missing or wrong, a key that was there
            before; or when the file is missing or holds no utterance.
    """
    path = place(path)
    found = False
    for where, value, key in unique_lines(path, "manifest", audio_field):
        found, labelled = True, "text" in value
        audio, text = value.pop("audio", None), value.pop("text", None)
        if not isinstance(audio, str) or not audio or "\0" in audio:
            raise UserError(
                f"{where}: `{audio_field}` must be the path of a file, not {shown(audio)}{_hint(value, audio)}"
            )
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: `text` must be text, not {shown(text)}; leave it out when it is unknown")
        if not labelled:
            _refuse_other_text(value, where)
        span = span_of(value, where)
        yield Utterance(key, audio_place(path.parent, audio, f"{where}: `{audio_field}`"), text, value, span)
    if not found:
        raise UserError(f"{path}: this manifest holds no utterances; write a line of JSON for each, with audio")


def audio_place(folder: Place, audio: str, where: str) -> Place:
    """The place of an audio file that a list names: a path counts from the list's folder, also one in a store.

    It raises UserError, which `where` opens, when it is a misspelt URL.
    """
    try:
        named = place(audio)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if named != Path(audio):
        return named
    if isinstance(folder, Path) or not {".", ".."} & set(audio.split("/")):
        return folder / audio
    path = posixpath.normpath(f"{folder.path}/{audio}")  # a store knows no `..`
    if path.startswith(".."):
        raise UserError(f"{where}: {audio} leads out of the store, counted from {folder}; name it by its URL")
    return ObjectPath(folder.protocol, path)


def read_transcripts(path: Place | str) -> dict[str, str]:
    """Read transcripts: on each line a JSON object with `key` and `text`; a manifest with text will do.

    It raises UserError as `read_manifest`.
    """
    return {key: value["text"] for _, value, key in _lines_with_text(place(path))}


class Transcripts:
    """As `read_transcripts`, for as many utterances as there may be: a temporary database that spills to the disk."""

    def __init__(self, path: Place | str) -> None:
        self._texts = database("texts (key TEXT PRIMARY KEY, text TEXT, nbest TEXT)").cursor()
        with spilling():
            self._texts.executemany(
                "INSERT INTO texts VALUES (?, ?, ?)",
                ((key, value["text"], _nbest(value, where)) for where, value, key in _lines_with_text(place(path))),
            )

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

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

    @property
    def lists(self) -> bool:
        """Whether every utterance has an n-best list."""
        return self._texts.execute("SELECT 1 FROM texts WHERE nbest IS NULL LIMIT 1").fetchone() is None


def _nbest(value: dict[str, Any], where: str) -> str | None:
    """The field `nbest` of a line, a list of objects with text and score, as JSON; None where there is none."""
    found = value.get("nbest")
    if found is None:
        return None
    objects = isinstance(found, list) and all(isinstance(one, dict) for one in found)
    pairs = [(one.get("text"), one.get("score")) for one in found] if objects else []
    if pairs and all(isinstance(text, str) and type(score) in (int, float) for text, score in pairs):
        return json.dumps(pairs)
    raise UserError(
        f"{where}: `nbest` must be a list of objects with text and score, not {shown(found)}; "
        "write it with `asr-kd transcribe … nbest=8`"
    )


def _lines_with_text(path: Place) -> Iterator[tuple[str, dict[str, Any], str]]:
    for where, value, key in unique_lines(path, "file of transcripts"):
        if not isinstance(value.get("text"), str):
            raise UserError(f"{where}: `text` must be text, not {shown(value.get('text'))}")
        yield where, value, key


def database(table: str) -> sqlite3.Connection:
    """A temporary one with a table, in memory while it is small."""
    made = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    made.execute("PRAGMA journal_mode = OFF")
    made.execute(f"CREATE TABLE {table} WITHOUT ROWID")
    return made


@contextlib.contextmanager
def spilling() -> Iterator[None]:
    """Name the disk that a temporary database fills."""
    try:
        yield
    except sqlite3.OperationalError as error:
        folder = os.environ.get("TMPDIR", "/var/tmp")  # where SQLite puts it
        raise UserError(
            f"{folder}: {error}, for the keys of a list; free some space, or set TMPDIR to a larger disk"
        ) from None


def write_transcripts(path: Place | str, texts: Iterable[tuple[str, str]]) -> None:
    """Write (key, text) pairs as JSON lines, whole or not at all."""
    with write_whole(path, "w") as file:
        for key, text in texts:
            file.write(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n")


def span_of(fields: dict[str, Any], where: str) -> Span:
    """Where in a recording an utterance lies, by the fields of its line that are BOUNDS.

    It raises UserError when one is no number of seconds, two contradict each other, or another name or unit is used.
    """
    for name, value in fields.items():
        pair = name in _OTHER_PAIRS and isinstance(value, list) and len(value) == 2 and all(map(_is_time, value))
        if pair or (_other(name) == "bound" and _is_time(value)):
            raise UserError(f"{where}: {name} is not known; give the bounds of a segment in seconds, as start and end")
    start, end, length = (_bound(fields, names, where) for names in (STARTS, ENDS, LENGTHS))
    if start is not None and end is None and length is None:
        for name in fields:
            if _other(name) == "length" and _is_time(fields[name]):
                raise UserError(f"{where}: {name} is not known; give the length of a segment in seconds, as duration")
    if length is not None and end is not None and abs((start or 0.0) + length - end) > ROUNDING:
        raise UserError(
            f"{where}: start {start or 0:g}, end {end:g} and duration {length:g} contradict each other; leave one out"
        )
    if end is None and length is not None:
        end = (start or 0.0) + length
    return Span(start or 0.0, end)


@functools.lru_cache(1000)
def _other(name: str) -> str:
    """What a field looks like that is none of BOUNDS."""
    plain = re.sub("(?<=[a-z])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).strip("_").lower()  # startTime, start (s), …
    if name in BOUNDS:
        return ""
    return "bound" if _OTHER_BOUNDS.fullmatch(plain) else "length" if _OTHER_LENGTHS.fullmatch(plain) else ""


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and bool(re.fullmatch(r"[\s\d.:,]+s?", value)))


def _refuse_other_text(fields: dict[str, Any], where: str) -> None:
    """Refuse a line without `text` whose text has another name, or is that of several segments."""
    for name in OTHER_TEXTS:
        if isinstance(fields.get(name), str):
            raise UserError(f"{where}: the text is called {name} there: call it text")
    for name in _SEGMENTS:
        if isinstance(fields.get(name), list) and any(isinstance(one, dict) and "text" in one for one in fields[name]):
            raise UserError(f"{where}: {name} has the texts of segments; write one line each, with start, end and text")


def perhaps_text(fields: dict[str, Any]) -> str | None:
    """The field of a line without `text` that may be one, but is too often something else to be refused; None where there is none."""
    return next((name for name in _PERHAPS_TEXTS if isinstance(fields.get(name), str) and fields[name].strip()), None)


def _bound(fields: dict[str, Any], names: tuple[str, ...], where: str) -> float | None:
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LATEST:
            raise UserError(f"{where}: {name} must be a number of seconds, not {shown(value)}; rename it where it means something else")  # fmt: skip
    if len(set(given.values())) > 1:
        raise UserError(f"{where}: {' and '.join(given)} contradict each other; leave one out")
    return float(next(iter(given.values()))) if given else None


def made_key(fields: dict[str, Any], where: str, folders: bool = False) -> str:
    """The key of a line that has none: the name of its audio file without extension, then `-` and start and end in milliseconds where it
    names a segment by its start or end. What a key may not hold (dots, control characters, …) becomes `_`. With `folders`,
    for lines whose keys would be the same, they stand in front, with `-` between them.
    """
    *parents, name = fields["audio"].rstrip("/").split("/")
    parts = [part for part in parents if part not in ("", ".", "..")] if folders else []
    key = "-".join([*parts, os.path.splitext(name)[0]])
    span = span_of(fields, where)
    if span != Span() and any(fields.get(name) is not None for name in (*STARTS, *ENDS)):
        key += "".join(f"-{round(1000 * bound)}" for bound in (span.start, span.end) if bound is not None)
    return cleaned(key)


def cleaned(key: str) -> str:
    """A text as a key: what that may not hold becomes `_`."""
    return "".join("_" if forbidden(character) else character for character in key).strip()


def forbidden(character: str) -> bool:
    """Whether a key cannot hold it."""
    return character in "./\\" or not character.isprintable()


def unique_lines(path: Place, what: str, audio_field: str = "audio") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Of every line of a list of utterances: the words that name it, its object without the key, and the key.

    It raises UserError as `read_manifest`; `what` names the role of the file, `audio_field` is what it calls `audio`.
    """
    # the keys seen so far lie in a temporary database that spills to the disk: a manifest may have any length
    with contextlib.closing(database("lines (key TEXT PRIMARY KEY, line INTEGER)")) as seen, spilling():
        counted = False
        for number, where, value in _lines(path, what, audio_field):
            audio = value.get("audio")
            if "key" not in value and audio is None:
                hint = _hint(value, audio)
                raise UserError(
                    f"{where}: has neither `{audio_field}` nor `key`{hint or '; add them, or remove the line'}"
                )
            if "key" not in value and not (isinstance(audio, str) and audio):
                raise UserError(
                    f"{where}: `{audio_field}` must be the path of a file, not {shown(audio)}{_hint(value, audio)}"
                )
            if "key" in value:
                key = check_key(value.pop("key"), where)
            else:
                if not counted:
                    _count_keys(seen, path, what, audio_field)
                counted, key = True, made_key(value, where)
                if seen.execute("SELECT 1 FROM keys WHERE key = ? AND lines > 1", (key,)).fetchone():
                    key = made_key(value, where, folders=True)
                check_key(key, f"{where} (give it a `key`)")
            try:
                seen.execute("INSERT INTO lines VALUES (?, ?)", (key, number))
            except sqlite3.IntegrityError:
                first = seen.execute("SELECT line FROM lines WHERE key = ?", (key,)).fetchone()[0]
                raise UserError(
                    f"{where}: the key {key} was there before, in line {first}; give one line a `key` of its own, or remove it"
                ) from None
            yield where, value, key


def _count_keys(seen: sqlite3.Connection, path: Place, what: str, audio_field: str) -> None:
    """In how many lines each key stands or would be made: the whole file is read for it, before the first key is made."""
    seen.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, lines INTEGER) WITHOUT ROWID")
    for _, where, value in _lines(path, what, audio_field):
        key, audio = value.get("key"), value.get("audio")
        if key is None and isinstance(audio, str) and audio:
            key = made_key(value, where)
        if isinstance(key, str):
            seen.execute("INSERT INTO keys VALUES (?, 1) ON CONFLICT DO UPDATE SET lines = lines + 1", (key,))


def _hint(fields: dict[str, Any], audio: object) -> str:
    """What to do where `audio` is an object or has another name."""
    if isinstance(audio, dict):
        inner = next((name for name in ("path", "file", "url") if isinstance(audio.get(name), str)), "path")
        return f'; `audio` is an object, as datasets of Hugging Face have it: give its path alone, "audio": {shown(audio.get(inner, "…"))}'
    name = next((name for name in OTHER_NAMES if audio is None and name in fields), None)
    if name and not isinstance(fields[name], str):
        return f"; {name} is an object there: give the path of its file as audio"
    return f"; the audio file is called {name} there: call it audio" if name else ""


def _lines(path: Place, what: str, audio_field: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The number of each line that is not empty, the words that name it, and its object, `audio` called so."""
    first = True
    for number, where, line in text_lines(path, what):
        text = line.strip()
        if first and (
            what_else := next((name for start, name in _OTHERS.items() if text.lower().startswith(start)), "")
        ):
            raise UserError(f"{where}: not JSON but {what_else}")
        if first and text[0] not in '{["':
            marks = {"\t": "tabs", ",": "commas", ";": "semicolons"}
            columns = next((marks[mark] for mark in marks if mark in text), "")
            kind = f"a table, with {columns} between its columns" if columns else "plain text"
            raise UserError(f"{where}: not JSON but {kind}; {_WANTED}")
        if first and text[0] == "[":
            raise UserError(f"{where}: a list of JSON; {_WANTED}: jq -c '.[]' {path} > list.jsonl")
        value, first = json_object(text, where), False
        if audio_field in value:
            value["audio"] = value.pop(audio_field)
        yield number, where, value


def json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object that can be written as JSON again; UserError, which `where` begins, when it is none."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object {{…}}, not {shown(value)}")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # NaN, half a character (a lone surrogate), too deep
        raise UserError(f"{where}: holds NaN, half a character or too deep JSON; fix or remove it") from None
    return value


def text_lines(path: Place, what: str) -> Iterator[tuple[int, str, str]]:
    """The number of each line that is not empty, the words that name it, and its text, of a file that gzip may have packed.

    It raises UserError when the file is missing, packed otherwise, damaged, or no UTF-8 text.
    """
    with _unpacked(path, what) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text; convert the file to UTF-8") from None
            if text.strip():
                yield number, where, text.rstrip("\r\n")


@contextlib.contextmanager
def _unpacked(path: Place, what: str) -> Iterator[IO[bytes]]:
    check_plain(path, what)
    with readable(path, what), local_copy(path) as copy, open(copy, "rb") as file:
        head = file.read(6)
        file.seek(0)
        if not head.startswith(GZIP):
            check_unpacked(head, path)
            yield file
            return
        try:
            with gzip.open(file) as unpacked:
                if unpacked.peek(2).startswith(GZIP):
                    raise UserError(f"{path}: is packed by gzip twice; unpack it first: gunzip < {path.name} > NEW.gz")
                yield unpacked  # type: ignore[misc]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: truncated or damaged gzip ({error}); fetch the file again") from None


def check_plain(path: Place, what: str) -> None:
    """Refuse a pipe or a device, which would be read but once, or without end; `what` names the role of the file."""
    if isinstance(path, Path) and os.path.exists(path) and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is a pipe or a device where a {what} was expected; write it to a file first")


def check_unpacked(head: bytes, path: Place, remedy: str = "") -> None:
    """Refuse a file that is packed, by its first bytes, naming the command that unpacks it, with `remedy` behind it."""
    for mark, what, command in _PACKED:
        if head.startswith(mark):
            raise UserError(f"{path}: is packed by {what}; unpack it first: {command} {path.name} > NEW{remedy}")


def shown(value: object) -> str:
    """A value as a message shows it, at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "…"
