"""Utterance lists in and out: JSON lines with `audio`, `key`, and optionally `text`, `speaker`, anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import parse_json, write_whole

# WebDataset ends a key at the first dot of a member's name; a slash would make it a path.
KEY = re.compile(r"[^\x00-\x20./\\\x7f]{1,200}")


@dataclass(frozen=True)
class Utterance:
    """A line of a manifest; `audio` is a path, `fields` is whatever else the line says (with the text)."""

    key: str
    audio: Path
    text: str | None
    fields: dict[str, Any] = field(default_factory=dict)


def check_key(key: Any, where: str) -> str:
    """A key that can name a member of a shard.

    Raises:
        UserError: when it is not a string, empty, too long, or holds a dot, slash, space or control character.
    """
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise UserError(f"{where}: the key {key!r} must be 1 to 200 characters without dots, slashes, spaces or control characters; rename it")
    return key


def read_manifest(path: Path | str) -> Iterator[Utterance]:
    """The utterances of a manifest, in order; relative audio paths count from the manifest's folder.

    Raises:
        UserError: naming file and line, when a line is not JSON, lacks `audio` or `key`, repeats a key, or has a wrong type.
    """
    path = Path(path)
    seen: set[str] = set()
    for where, line in _lines(path, "manifest"):
        if not isinstance(line.get("audio"), str) or not line["audio"]:
            raise UserError(f"{where}: `audio` must be the path of a file; add it")
        key = check_key(line.get("key", Path(line["audio"]).stem), where)
        if key in seen:
            raise UserError(f"{where}: the key {key} occurs twice; make keys unique")
        seen.add(key)
        text = line.get("text")
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: `text` must be a string, not {text!r}; quote it")
        fields = {name: value for name, value in line.items() if name not in ("audio", "key") and value is not None}
        yield Utterance(key, path.parent / line["audio"], text, fields)
    if not seen:
        raise UserError(f"{path}: the manifest is empty; give one JSON object a line")


def read_transcripts(path: Path | str) -> dict[str, str]:
    """Texts by key, from JSON lines of `key` and `text`.

    Raises:
        UserError: naming file and line.
    """
    texts: dict[str, str] = {}
    for where, line in _lines(Path(path), "file of transcripts"):
        if not isinstance(line.get("key"), str) or not isinstance(line.get("text"), str):
            raise UserError(f"{where}: needs `key` and `text`, both strings")
        if line["key"] in texts:
            raise UserError(f"{where}: the key {line['key']} occurs twice; make keys unique")
        texts[line["key"]] = line["text"]
    return texts


def write_transcripts(path: Path | str, texts: Iterable[tuple[str, str]]) -> None:
    """Write (key, text) pairs as JSON lines, whole or not at all."""
    with write_whole(path, "w") as file:
        for key, text in texts:
            file.write(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n")


def _lines(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    value = parse_json(line, where)
                    if not isinstance(value, dict):
                        raise UserError(f"{where}: must be a JSON object, not {value!r:.40}")
                    yield where, value
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder where a {what} was expected") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: this {what} is not UTF-8 text") from None
