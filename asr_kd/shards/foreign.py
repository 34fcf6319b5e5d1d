"""Tars that others wrote for WebDataset: which of their members are the audio and the text of an utterance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from asr_kd.audio.decode import EXTENSIONS, length_of
from asr_kd.errors import AudioError, UserError
from asr_kd.files import Place, parse_json
from asr_kd.shards.manifest import OTHER_TEXTS, check_key, cleaned, shown

#: members that are read, besides audio and the one that is named
JSON, TXT, CLS = "json", "txt", "cls"


@dataclass(frozen=True)
class Reading:
    """Where texts stand in tars of others.

    Attributes:
        text: ending of members (`txt`), or field of their JSON (`json.text`); None: `json.text`, `txt` or `cls`, whichever is there.
        classes: the texts that the numbers in `cls` stand for; None: numbers are no texts.
    """

    text: str | None = None
    classes: tuple[str, ...] | None = None


@dataclass
class Account:
    """What was found in a tar of others: (key, reason) of what is no utterance, how many members of which ending nobody reads, and how
    many texts come from where."""

    bad: list[tuple[str, str]] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)


def foreign_samples(
    path: Place, members: Iterable[tuple[str, bytes]], reading: Reading, account: Account
) -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
    """The utterances of a tar that others wrote: key, bytes of the audio, its kind, and fields, `seconds` among them.

    As for WebDataset, a name up to the first dot behind its folders is the key, and the members of an utterance stand side by side. Folders
    are joined by `-`, and what our keys may not hold becomes `_`. What cannot be used is passed over, with its reason in `account`.

    Args:
        path: of the tar, for messages.
        members: name and content of each.
        reading: where texts stand.
        account: is filled in.

    Raises:
        UserError: when the members of an utterance are apart, or two utterances get the same key.
    """
    names: dict[str, str] = {}  # of utterances, by their keys
    found: dict[str, bytes] = {}
    key = ""
    for name, data in members:
        last, stem, ending = parts_of(name)
        if not (stem and ending in (JSON, TXT, CLS, reading.text, *EXTENSIONS)):
            account.unread["." * ("." in last) + ending or last] += 1
            continue
        own = foreign_key(path, name)
        if own != key:
            yield from _sample(key, found, reading, account)
            key, found = own, {}
            if own in names:
                raise UserError(
                    f"{path}: the members {names[own]!a} and {name!a} stand apart, or are two utterances with the key {own}; "
                    "pack them in the order of their names (tar --sort=name), under names that differ"
                )
            names[own] = name
        if ending in found:
            raise UserError(f"{path}: {own}.{ending} is there twice; pack its files once, under names that differ")
        found[ending] = data
    yield from _sample(key, found, reading, account)


def parts_of(name: str) -> tuple[str, str, str]:
    """The name of a member without its folders, and both sides of its first dot; the ending in small letters."""
    last = name.rpartition("/")[2]
    stem, _, ending = last.partition(".")
    return last, stem, ending.lower()


def foreign_key(path: Place, name: str) -> str:
    """The key that a member of this name belongs to; UserError when it can be none."""
    folders = [part for part in name.rpartition("/")[0].split("/") if part not in ("", ".")]
    return check_key(cleaned("-".join([*folders, parts_of(name)[1]])), f"{path}: {name!a}")


def _sample(
    key: str, found: dict[str, bytes], reading: Reading, account: Account
) -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
    if not found:
        return
    try:
        audio = [ending for ending in EXTENSIONS if ending in found]
        if len(audio) != 1:
            raise AudioError(
                f"has {' and '.join(audio) or 'no audio'} among {', '.join(found)}, where one audio file belongs"
            )
        fields = parse_json(_decoded(found[JSON], JSON), JSON) if JSON in found else {}
        if not isinstance(fields, dict):
            raise AudioError(f"its JSON is {shown(fields)}, no object")
        source, text = _text(found, fields, reading)
        fields.pop("text", None)
        if text is not None:
            fields["text"] = text
        json.dumps(fields, ensure_ascii=False).encode()  # half a character (a lone surrogate) cannot be written
        fields["seconds"] = round(length_of(found[audio[0]], key), 6)
    except UnicodeEncodeError:
        account.bad.append((key, "its JSON holds half a character (a lone surrogate)"))
    except UserError as error:
        account.bad.append((key, str(error).removeprefix(f"{key}: ")))
    else:
        account.texts[source] += 1
        yield key, found[audio[0]], audio[0], fields


def _text(found: dict[str, bytes], fields: dict[str, Any], reading: Reading) -> tuple[str, str | None]:
    """Where the text of an utterance stands, and the text; "" and None for one without; AudioError when it cannot be told."""
    wanted = ["json.text", TXT, CLS] if reading.text is None else [reading.text]
    texts: dict[str, str] = {}
    for source in wanted:
        if source.startswith("json."):
            value = fields.get(source.removeprefix("json."))
            if value is not None and not isinstance(value, str):
                raise AudioError(f"{source} is {shown(value)}, no text")
        elif source in found:
            value = _decoded(found[source], source).removeprefix("\ufeff").strip()
            if source == CLS and value.isdecimal():
                value = None if reading.classes is None else _class(int(value), reading.classes)
        else:
            value = None
        if value is not None:
            texts[source] = value
    if len(set(texts.values())) > 1:
        raise AudioError(
            f"{' and '.join(texts)} hold different texts; choose one, such as text={next(reversed(texts))}"
        )
    other = next((name for name in OTHER_TEXTS if isinstance(fields.get(name), str)), None)
    if not texts and other and reading.text is None:
        raise AudioError(f"its text seems to be called {other}; set text=json.{other}")
    return next(iter(texts.items()), ("", None))


def _class(number: int, classes: tuple[str, ...]) -> str:
    if number >= len(classes):
        raise AudioError(f"has the class {number}, and classes has {len(classes)} lines, counted from 0")
    return classes[number]


def _decoded(data: bytes, ending: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise AudioError(f"its {ending} is not UTF-8 text") from None
