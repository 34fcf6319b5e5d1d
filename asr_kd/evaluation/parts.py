"""What scoring says of one shard, on disk: a part file, whole or not there, the same bytes whoever wrote it, and what it took.

A part is JSON lines: a header, then a line for each system and utterance. Beside it lies what differs from run to run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from asr_kd.errors import UserError
from asr_kd.files import Place, clear_errors, read_json, write_json, write_whole
from asr_kd.shards.index import ShardInfo

FORMAT, VERSION = "asr_kd-scores", 1
#: what was measured of a system on a shard, in seconds
TIMED = ("frontend_seconds", "network_seconds", "decoder_seconds")


@dataclass(frozen=True)
class Costs:
    """Seconds that a system took, and of the audio that it was timed on."""

    seconds: float = 0.0  # of audio
    frontend_seconds: float = 0.0
    network_seconds: float = 0.0
    decoder_seconds: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(*map(operator.add, astuple(self), astuple(other)))

    @property
    def factor(self) -> float:
        """Seconds of front end and network for a second of audio."""
        return (self.frontend_seconds + self.network_seconds) / self.seconds


@dataclass(frozen=True)
class Shard:
    """A test shard: the set that it belongs to by name, that set's folder, what its index says."""

    set: str
    folder: str | list[str]
    info: ShardInfo

    def __str__(self) -> str:
        return str(self.info.at(self.folder))

    def part(self, output: Place) -> Place:
        """Where its scores belong."""
        return output / "parts" / self.set / f"{self.info.name.removesuffix('.tar')}.jsonl"


class Line(TypedDict):
    """A line of a part, and of utterances.jsonl: an utterance and what a system made of it."""

    system: str
    set: str
    shard: str
    key: str
    speaker: str | None
    seconds: float
    fields: dict[str, Any]  # every other number or text that the shard says of the utterance
    reference: str
    hypothesis: str
    reference_scored: str  # as it was compared
    hypothesis_scored: str
    words: int
    substitutions: int
    deletions: int
    insertions: int
    errors: int
    characters: int
    character_errors: int
    times: list[list[Any]]  # word as decoded, start and end in seconds, confidence
    tokens: NotRequired[list[list[Any]]]  # unit piece, start, end; not in lines of earlier versions
    same_as_teacher: bool | None  # null without a teacher


@dataclass
class Part:
    """The scores of a shard: how many utterances were scored, and seconds of their audio."""

    utterances: int
    seconds: float
    quarantined: dict[str, str]  # those that were not scored, key → reason
    body: bytes  # JSON lines, one for each system and utterance, system by system; README.md describes them

    @property
    def lines(self) -> Iterator[Line]:
        """The lines of the body."""
        return map(json.loads, self.body.splitlines())


def write_part(path: Place, made_of: str, part: Part, costs: dict[str, Costs]) -> None:
    """Publish a part, and before it, beside it, what it took.

    Args:
        path: of the part.
        made_of: hash of everything that decides it.
        part: what was scored.
        costs: what it took, by system.
    """
    rest = {
        "utterances": part.utterances, "seconds": part.seconds, "quarantined": part.quarantined,
        "sha256": hashlib.sha256(part.body).hexdigest(),
    }  # fmt: skip
    took = {name: {key: getattr(one, key) for key in TIMED} for name, one in costs.items()}
    write_json(_costs(path), {"seconds": part.seconds, "systems": took}, make_folder=False)
    with write_whole(path, make_folder=False) as file:
        file.write(_head(made_of) + b", " + json.dumps(rest, ensure_ascii=False).encode()[1:] + b"\n" + part.body)


def is_there(path: Place, made_of: str) -> bool:
    """Whether there is a part of this origin; one of another origin (a checkpoint or the audio has changed) is stale, and none.

    A file that is no part is a UserError.
    """
    head = _head(made_of)
    try:
        with clear_errors(path):
            if isinstance(path, Path):
                with open(path, "rb") as file:
                    start = file.read(len(head))
            else:
                start = path.read_bytes(len(head))
    except FileNotFoundError:
        return False
    if start != head:
        _parse(path, path.read_bytes())
    return start == head


def read_part(path: Place) -> Part:
    """A part; a UserError where it is missing or damaged."""
    try:
        header, body = _parse(path, path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is gone, removed since it was written; run the command again") from None
    if hashlib.sha256(body).hexdigest() != header["sha256"]:
        raise _damaged(path)
    return Part(header["utterances"], header["seconds"], header["quarantined"], body)


def read_costs(path: Place) -> dict[str, Costs]:
    """What each system took for the part at `path`; a UserError where that is missing or damaged."""
    costs = _costs(path)
    if not costs.exists():
        raise UserError(f"{costs}: is gone; remove {path.name} beside it too, and run the command again")
    value = read_json(costs)
    try:
        seconds = float(value["seconds"])
        return {name: Costs(seconds, *(float(one[key]) for key in TIMED)) for name, one in value["systems"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(costs) from None


def _costs(path: Place) -> Place:
    return path.parent / f"{path.stem}.costs.json"


def _head(made_of: str) -> bytes:
    return json.dumps({"format": FORMAT, "version": VERSION, "made_of": made_of}).encode()[:-1]


def _parse(path: Place, data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body."""
    first, _, body = data.partition(b"\n")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        header = json.loads(first)
        if header["format"] == FORMAT and {"version", "made_of", "sha256"} <= header.keys():
            return header, body
    raise _damaged(path)


def _damaged(path: Place) -> UserError:
    return UserError(f"{path}: is damaged; remove it and run the command again")
