"""What the readers of manifests share: an entry, the key that is made of it, the files of a folder, audio within other files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asr_kd.audio.decode import EXTENSIONS
from asr_kd.errors import AudioError, UserError
from asr_kd.files import Place, names_in, readable
from asr_kd.objects import URL, ObjectPath, Stat
from asr_kd.shards.manifest import KEY_BYTES, OTHER_TEXTS, Span, Utterance, database, forbidden, shown, spilling
from asr_kd.temporary import room_for, temporary

#: endings by which a file of a folder or a member of a tar counts as audio; what it is, its bytes say
AUDIO = {
    *EXTENSIONS, "oga", "spx", "aiff", "aif", "aifc", "au", "snd", "sph", "nist", "w64", "rf64", "caf", "m4a", "m4b", "mp4", "mov", "aac", "ac3", "mp2", "mpga", "wma", "amr", "3gp", "webm",
    "mka", "mkv", "ape", "wv", "tta", "shn", "ra", "voc",
}  # fmt: skip
#: bytes of a key that is cut, to leave room for what tells it from others
_CUT = KEY_BYTES - 40
_WHOLE = Span()
#: bytes of embedded audio that are copied at a time
BLOCK = 1 << 24


@dataclass
class Entry:
    """An utterance as the original has it.

    Attributes:
        where: the words that name its line, for messages.
        name: its id, or the path of its audio; its key is made of that.
        audio: where its sound is.
        text: what was said, if it is known.
        fields: what else is known.
        span: where in the recording it lies.
        identity: what no other entry of the manifest may have; None where nothing can be there twice.
    """

    where: str
    name: str
    audio: Place
    text: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    span: Span = _WHOLE
    identity: str | None = None


def keyed(entries: Iterable[Entry]) -> Iterator[Utterance]:
    """Entries as utterances with keys that differ: the name, with `-` for slashes and `_` for all else that no key may hold,
    cut where it is too long; a key that an earlier entry has gets a number behind it.

    It raises UserError where an identity comes back. Names and keys lie in a temporary database that spills to the disk.
    """
    with contextlib.closing(database("names (name TEXT PRIMARY KEY, place TEXT)")) as seen, spilling():
        seen.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, uses INTEGER) WITHOUT ROWID")
        for one in entries:
            if one.identity is not None:
                try:
                    seen.execute("INSERT INTO names VALUES (?, ?)", (one.identity, one.where))
                except sqlite3.IntegrityError:
                    first = seen.execute("SELECT place FROM names WHERE name = ?", (one.identity,)).fetchone()[0]
                    raise UserError(
                        f"{one.where}: {shown(one.identity)} was there before ({first}); remove one of them"
                    ) from None
            one.fields.pop("text", None)  # it would count as what was said
            yield Utterance(_unused(seen, safe_key(one.name)), one.audio, one.text, one.fields, one.span)


def safe_key(name: str) -> str:
    """A key made of an id or a path."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    key = "".join("_" if forbidden(character) else character for character in "-".join(parts)).strip() or "_"
    if len(key.encode()) > _CUT:
        mark = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        key = f"{key.encode()[:_CUT].decode(errors='ignore').rstrip()}-{mark}"
    return key


def _unused(seen: sqlite3.Connection, wanted: str) -> str:
    key = wanted
    while True:
        try:
            seen.execute("INSERT INTO keys VALUES (?, 1)", (key,))
            return key
        except sqlite3.IntegrityError:
            seen.execute("UPDATE keys SET uses = uses + 1 WHERE key = ?", (wanted,))
            uses = seen.execute("SELECT uses FROM keys WHERE key = ?", (wanted,)).fetchone()[0]
            key = f"{wanted}-{uses}"


def stem(path: str) -> str:
    """A path without the ending of its file."""
    return os.path.splitext(path)[0]


def ending(path: str) -> str:
    """What follows the last dot of a file's name, in small letters."""
    return os.path.splitext(path)[1][1:].lower()


def words(line: str, most: int = -1) -> list[str]:
    """A line split at its blanks and tabs, at most so often; other characters that look like blanks are parts of words."""
    return [word for word in re.split(r"[ \t\r\f\v]+", line.strip(" \t\r\f\v"), maxsplit=max(most, 0)) if word]


def take_text(fields: dict[str, Any], where: str) -> str | None:
    """Remove the text from the fields, by the first of the names that others give it, and return it; UserError if it is no text."""
    name = next((name for name in ("text", *OTHER_TEXTS) if fields.get(name) is not None), None)
    text = fields.pop(name) if name else None
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: `{name}` must be text, not {shown(text)}")
    return text


def files_below(folder: Place) -> Iterator[str]:
    """Paths of the files below a folder, from it, sorted within each folder; of a folder in a store, those directly in it.

    Hidden ones (`._x.wav` of macOS) are passed over, links followed. Memory holds the names of one folder.
    """
    if isinstance(folder, ObjectPath):
        yield from sorted(name for name in names_in(folder) if not name.startswith("."))
    else:
        yield from _below(folder, "", ())


def _below(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    with readable(folder, "folder"):
        here = folder.stat()
        if (here.st_dev, here.st_ino) in above:
            raise UserError(f"{folder}: is a link to a folder that it lies in; remove it")
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_dir()) for entry in found if not entry.name.startswith("."))
    for name, is_folder in entries:
        if not is_folder:
            if re.search("[\ud800-\udfff]", name):
                raise UserError(f"{folder}: the name of the file {name!a} is not UTF-8; rename it")
            yield prefix + name
    for name, is_folder in entries:
        if is_folder:
            yield from _below(folder / name, f"{prefix}{name}/", (*above, (here.st_dev, here.st_ino)))


def root_of(folder: Place, path: str) -> Place:
    """Where the relative paths of a manifest count from, by one of them: its own folder, or where the file is, if not there: the working
    directory, or a folder above its own, the nearest first.

    Kaldi's and Lhotse's paths count from where a recipe was run, `data/train` is a folder of that place, and corpora
    come in this form (speechocean762).
    """
    if not isinstance(folder, Path) or os.path.isabs(path):
        return folder
    places = (folder, Path.cwd(), *folder.absolute().parents)
    return next((one for one in places if os.path.exists(one / path)), folder)  # also of a name that is too long


@dataclass(frozen=True)
class Embedded(ObjectPath):
    """An audio file within another one (`container`), with the methods that reading it takes. `protocol` is its kind."""

    container: Place

    def __str__(self) -> str:
        return f"{self.container}, {self.path}"

    def exists(self) -> bool:
        return True

    def is_file(self) -> bool:
        return True

    def is_dir(self) -> bool:
        return False

    def read_bytes(self, size: int | None = None, start: int = 0) -> bytes:
        """Its bytes; AudioError when they cannot be had."""
        raise NotImplementedError

    def stat(self) -> Stat:
        return Stat(len(self.read_bytes()))

    @contextlib.contextmanager
    def fetched(self) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            with room_for(f"a copy of {self}"):
                file, copy = stack.enter_context(temporary())
                for start in range(0, self.stat().st_size, BLOCK):  # a recording of any length
                    file.write(self.read_bytes(BLOCK, start))
                file.flush()
            yield copy


@dataclass(frozen=True)
class Member(Embedded):
    """A member of a tar, which has `size` bytes from `begin` on."""

    begin: int
    size: int

    def stat(self) -> Stat:
        return Stat(self.size)

    def read_bytes(self, size: int | None = None, start: int = 0) -> bytes:
        wanted = self.size - start if size is None else min(size, self.size - start)
        if isinstance(self.container, ObjectPath):
            data = self.container.read_bytes(wanted, self.begin + start)
        else:
            with open(self.container, "rb") as file:
                file.seek(self.begin + start)
                data = file.read(wanted)
        if len(data) < wanted:
            raise AudioError(f"{self}: the tar was cut since its list of members was read; start anew")
        return data


def packed(audio: Place, base: Place) -> Any:
    """Where audio is, as JSON; what lies below `base` is found there by `unpacked` from wherever a process is started."""
    if isinstance(audio, Embedded):
        inside = {one.name: getattr(audio, one.name) for one in dataclasses.fields(audio)}
        return inside | {"container": packed(audio.container, base)}
    text = str(audio)
    if base == Path() and isinstance(audio, Path) and not audio.is_absolute():
        return f"./{text}"
    return f".{text[len(str(base)) :]}" if text.startswith(f"{base}/") else text


def unpacked(value: Any, base: Place, kinds: Mapping[str, type[Embedded]]) -> Place:
    """The inverse of `packed`; `kinds`: the classes of embedded audio by their `protocol`."""
    if isinstance(value, dict):
        return kinds[value["protocol"]](**value | {"container": unpacked(value["container"], base, kinds)})
    if value.startswith("./"):
        return base / value[2:]
    return ObjectPath.parse(value) if URL.fullmatch(value) else Path(value)
