"""Every utterance as the page carries it: one compressed block of JSON lines, made and read without holding the texts.

The block is gzip in base64. Its first line is an object that names the columns; each further line is a row,
`[key, set, speaker, seconds, reference as scored, [values of the fields], edits of each system …]`. Edits turn the
reference into the hypothesis: `[index of the reference word, word]` is a substitution, `[index]` a deletion,
`[index, word, 1]` an insertion before that word. A system without errors has `[]`, one without a line null.
"""

from __future__ import annotations

import base64
import collections
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

from asr_kd.evaluation.parts import Line
from asr_kd.evaluation.slices import value_name
from asr_kd.evaluation.wer import Edit, align
from asr_kd.files import Place, local_copy

ROWS = 100_000  # rows of the page at most; beyond it the utterances with the most errors are kept

Group = dict[str, Line]  # of one utterance: its lines, by system
Identity = tuple[str | None, str, str | None]  # set, key and shard


@dataclass
class Packed:
    """The block, how many of how many utterances are in it, and the lines of the utterances that were asked for."""

    block: str
    rows: int
    utterances: int
    wanted: dict[Identity, Group] = field(default_factory=dict)


def read_lines(path: Place) -> Iterator[Line]:
    """The lines of `utterances.jsonl`."""
    with local_copy(path) as copy, open(copy, encoding="utf-8") as file:
        yield from map(json.loads, file)


def by_utterance(lines: Iterable[Line]) -> Iterator[Group]:
    """Lines of the same utterance brought together, in order; one shard's lines are held at a time."""
    for _, shard in itertools.groupby(lines, lambda line: (line.get("set"), line.get("shard"))):
        groups: dict[str, Group] = {}
        for line in shard:
            groups.setdefault(line["key"], {})[line["system"]] = line
        yield from groups.values()


def pack(
    read: Callable[[], Iterable[Line]],
    systems: list[str],
    fields: list[str],
    wanted: Set[Identity],
    utterances: int,
    limit: int = ROWS,
) -> Packed:
    """Pack the lines.

    Args:
        read: gives the lines, from the first on, each time it is called.
        systems: whose edits rows carry.
        fields: manifest fields whose values rows carry, to be searched for.
        wanted: utterances whose lines are returned too.
        utterances: how many there are.
        limit: rows at most. Beyond it the first with the most errors (of the system that made most) are kept.
    """
    room, least = limit, -1  # rows with more errors than `least` are kept, and `room` of those with as many
    if utterances > limit:
        most = collections.Counter(map(_most_errors, by_utterance(read())))
        for least, count in sorted(most.items(), reverse=True):  # noqa: B007
            if count > room:
                break
            room -= count
    compressor = zlib.compressobj(9, wbits=31)
    block, rows = bytearray(compressor.compress(_line({"systems": systems, "fields": fields}))), 0
    found: dict[Identity, Group] = {}
    for group in by_utterance(read()):
        first = next(iter(group.values()))
        identity = first.get("set"), first["key"], first.get("shard")
        if identity in wanted:
            found[identity] = group
        errors = _most_errors(group)
        if errors < least or (errors == least and not room):
            continue
        room -= errors == least
        rows += 1
        known = first.get("fields", {})
        row = [
            first["key"], first.get("set"), first["speaker"], round(first.get("seconds", 0.0), 2), first["reference_scored"],
            [value_name(known.get(name)) for name in fields],
            *(_short(group[name]) if name in group else None for name in systems),
        ]  # fmt: skip
        block += compressor.compress(_line(row))
    block += compressor.flush()
    return Packed(base64.b64encode(block).decode(), rows, utterances, found)


def edits_of(line: Line) -> list[Edit]:
    """The alignment of the texts as scored, one step a word."""
    return align(line["reference_scored"], line["hypothesis_scored"])


def _most_errors(group: Group) -> int:
    return max(line["errors"] for line in group.values())


def _short(line: Line) -> list[list[Any]]:
    if not line["errors"]:
        return []
    edits, index = list[list[Any]](), 0
    for kind, _, heard in edits_of(line):
        if kind == "substitution":
            edits.append([index, heard])
        elif kind == "deletion":
            edits.append([index])
        elif kind == "insertion":
            edits.append([index, heard, 1])
        index += kind != "insertion"
    return edits


def _line(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
