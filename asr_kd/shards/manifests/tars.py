"""WebDataset tars of others: audio members, with `.txt`, `.json` or `.cls` of the same key beside them."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from asr_kd.errors import UserError
from asr_kd.files import Place, local_copy, readable
from asr_kd.shards.manifest import check_unpacked, database, json_object, spilling
from asr_kd.shards.manifests.entries import AUDIO, Entry, Member, ending, files_below, take_text
from asr_kd.shards.tarset import OF_MACOS, scan

#: members that say something about the audio beside them
TXT, JSON, CLS = "txt", "json", "cls"
#: bytes of such a member at most
MOST = 1 << 24


class Found(NamedTuple):
    """A member of a tar: its name, which is key, dot and extension, its place in the tar, and its content, if it is no audio that is read."""

    name: str
    key: str
    extension: str
    begin: int
    size: int
    content: bytes


def tars(path: Place) -> Iterator[Place]:
    """A tar, or all tars below a folder."""
    if path.is_dir():
        yield from (path / name for name in files_below(path) if ending(name) == "tar")
    else:
        yield path


def entries(path: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The samples of a tar, or of all tars below a folder: members in a row whose names are the same up to the first dot.

    Raises:
        UserError: naming tar and member, as `scan`; when a sample has several audio members, or text beside it cannot be
            read; when its members do not stand side by side, or a key comes back.
    """
    for tar in tars(path):
        for found in _samples(tar):
            key = found[0].key
            audio = [one for one in found if ending(one.name) in AUDIO]
            if len(audio) > 1:
                names = " and ".join(one.name for one in audio[:2])
                raise UserError(f"{tar}: {names} are one sample, as keys end at the first dot; make the tar again with keys without dots")  # fmt: skip
            if not audio:
                notes["samples without audio"] += 1
                continue
            text, fields = _beside(tar, found, notes)
            member = Member("tar", audio[0].name, tar, audio[0].begin, audio[0].size)
            yield Entry(str(member), key, member, text, fields)


def _samples(tar: Place) -> Iterator[list[Found]]:
    """The members of each sample of a tar; UserError where those of one do not stand side by side."""
    with contextlib.closing(database("seen (key TEXT PRIMARY KEY, name TEXT)")) as seen, spilling():
        for key, group in itertools.groupby(members(tar), lambda one: one.key):
            found = list(group)
            try:
                seen.execute("INSERT INTO seen VALUES (?, ?)", (key, found[0].name))
            except sqlite3.IntegrityError:
                first = seen.execute("SELECT name FROM seen WHERE key = ?", (key,)).fetchone()[0]
                raise UserError(
                    f"{tar}: {first} and {found[0].name} have one key, and others stand between them; make the tar again with the files of a "
                    "sample side by side (tar --sort=name), and a key for each"
                ) from None
            yield found


def members(tar: Place) -> Iterator[Found]:
    """The plain files of a tar, in order, with the content of those that say something about audio.

    It raises UserError when the tar is missing, packed, cut or damaged, or a member is a link or a device.
    """
    with readable(tar, "tar"), local_copy(tar) as copy, open(copy, "rb") as file:
        check_unpacked(file.read(6), tar)
        for name, size, plain in scan(tar, file, copy.stat().st_size):
            folder, slash, last = name.rpartition("/")
            if plain is None or OF_MACOS.match(last):
                continue
            if not plain:
                raise UserError(f"{tar}: the member {name} is a link or a device; make the tar again: tar chf")
            key, _, extension = last.partition(".")
            begin, content = file.tell(), b""
            if extension.lower() in (TXT, JSON, CLS):
                if size > MOST:
                    raise UserError(f"{tar}: the member {name} has {size} bytes, which is no text of an utterance")
                content = file.read(size)
            yield Found(name, f"{folder}{slash}{key}", extension.lower(), begin, size, content)


def _beside(tar: Place, found: list[Found], notes: Counter[str]) -> tuple[str | None, dict[str, Any]]:
    """Text and fields that the members of a sample say."""
    fields: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for one in found:
        where = f"{tar}: {one.name}"
        if one.extension not in (TXT, JSON, CLS):
            if ending(one.name) not in AUDIO:
                notes[f".{one.extension} members not read"] += 1
            continue
        if one.extension in texts:
            raise UserError(f"{where}: stands twice; make the tar again with one of them")
        try:
            texts[one.extension] = one.content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise UserError(f"{where}: is no UTF-8 text; make the tar again") from None
        if one.extension == JSON:
            fields |= json_object(texts[JSON], where)
    text = take_text(fields, f"{tar}: {found[0].key}.{JSON}")
    if text is not None and texts.get(TXT, text) != text.strip():
        notes["samples whose .json has another text than their .txt, which is taken"] += 1
    if CLS in texts:
        with contextlib.suppress(ValueError):
            fields["class"] = int(texts[CLS])
        fields.setdefault("class", texts[CLS])
    return texts.get(TXT, text), fields
