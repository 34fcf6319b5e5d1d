"""Which utterances of a set are used: a list as `asr-kd select` writes it, JSON lines; or as `asr-kd pair` does, with what each is paired with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from asr_kd.errors import UserError
from asr_kd.files import Place, place
from asr_kd.shards.index import ShardList
from asr_kd.shards.manifest import database, shown, spilling, unique_lines
from asr_kd.shards.tarset import read_index

#: of a line, besides its key: which set it speaks of (the hash of its index), the shard, the length, and whether it is used
Kind = type | tuple[type, ...]
FIELDS: dict[str, Kind] = {"set": str, "shard": str, "seconds": (int, float), "kept": bool}


#: more than any length in seconds, or offset in milliseconds
DAY = 86_400_000


class Chosen:
    """The utterances of a set of shards that a list keeps, in a temporary database that spills to the disk.

    Args:
        path: the list; an utterance that it does not name is left out like one that it does not keep.
        audio: folder of the shards, or several.

    Attributes:
        shards: the set as if it held those alone; a shard of which all are kept is as in the index.
        left_out: number of utterances that are not kept.

    Raises:
        UserError: when the list is not one of `verb`, speaks of other audio, names shards or more utterances than there are, or
            keeps nothing.
    """

    #: what makes such lists, and what they say of an utterance that is kept, besides FIELDS
    verb = "select"
    more: ClassVar[dict[str, Kind]] = {}

    def __init__(self, path: Place | str, audio: str | list[str]) -> None:
        self.path, self.audio = place(path), audio
        index = read_index(audio)
        whole = index.hash
        self._kept = database("kept (shard TEXT, key TEXT, seconds REAL, more TEXT, PRIMARY KEY (shard, key))").cursor()

        with spilling():
            self._kept.executemany("INSERT INTO kept VALUES (?, ?, ?, ?)", self._read(whole))
        self.shards = self._counted(index)
        self.left_out = index.samples - self.shards.samples

    def _read(self, whole: str) -> Iterator[tuple[str, str, float, str]]:
        for where, value, key in unique_lines(self.path, "list of utterances"):
            for name, kind in {**FIELDS, **(self.more if value.get("kept") is True else {})}.items():
                if not isinstance(value.get(name), kind) or _odd(name, value[name]):
                    raise UserError(
                        f"{where}: {name} is {shown(value.get(name))}; make the list with `asr-kd {self.verb}`, and change kept alone"
                    )
            if value["set"] != whole:
                raise UserError(
                    f"{where}: speaks of other audio (index {value['set'][:16]}) than {self.audio} holds ({whole}); run "
                    f"`asr-kd {self.verb}` on this audio"
                )
            if value["kept"]:
                yield value["shard"], key, value["seconds"], json.dumps({name: value[name] for name in self.more})

    def _counted(self, index: ShardList) -> ShardList:
        found = self._kept.execute("SELECT shard, COUNT(*), SUM(seconds) FROM kept GROUP BY shard").fetchall()
        if not found:
            raise UserError(
                f"{self.path}: keeps none of the utterances of {self.audio}; ask less of `asr-kd {self.verb}`"
            )
        names, samples, seconds = zip(*found, strict=True)
        held = index.holding(np.array(names, "S"), np.array(samples), np.round(seconds, 6))
        if isinstance(held, str):
            key = self._kept.execute("SELECT key FROM kept WHERE shard = ?", (held,)).fetchone()[0]
            raise UserError(
                f"{self.path}: {key} or others it keeps are not in {self.audio}/{held}; run `asr-kd {self.verb}` on this audio"
            )
        return held

    def keys(self, shard: str) -> frozenset[str]:
        """Keys of the utterances of a shard that are kept."""
        return frozenset(key for (key,) in self._kept.execute("SELECT key FROM kept WHERE shard = ?", (shard,)))

    def check(self, shard: str, found: Iterable[str]) -> None:
        """Refuse the list when one of a shard's utterances that it keeps is not among those found there."""
        if missing := self.keys(shard).difference(found):
            raise UserError(
                f"{self.path}: {min(missing)} is not in {self.audio}/{shard}; run `asr-kd {self.verb}` on this audio"
            )


def _odd(name: str, value: Any) -> bool:
    """Whether a value of the right type is none that a job writes."""
    if name in ("shard", "heard"):
        return not re.fullmatch(r"[\x21-\x2e\x30-\x7e]+", value)  # a plain file name
    if name in ("seconds", "offset_ms"):
        return isinstance(value, bool) or not (0 if name == "seconds" else -DAY) <= value <= DAY
    return False


class Pair(NamedTuple):
    """The recording of the same moments that somebody else hears: its shard, that shard's SHA-256, and how far ours is behind it."""

    heard: str
    heard_sha256: str
    offset_ms: float


class Pairs(Chosen):
    """The utterances of a set that are paired with those of another, as `asr-kd pair` lists them; else as `Chosen`."""

    verb = "pair"
    more: ClassVar[dict[str, Kind]] = {"heard": str, "heard_sha256": str, "offset_ms": (int, float)}

    def of(self, shard: str) -> dict[str, Pair]:
        """What each utterance of a shard is paired with."""
        found = self._kept.execute("SELECT key, more FROM kept WHERE shard = ?", (shard,))
        return {key: Pair(**json.loads(more)) for key, more in found}
