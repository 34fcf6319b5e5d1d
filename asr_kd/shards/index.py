"""What an index says about the shards of a set, a million of them in a hundred megabytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from binascii import hexlify
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import (
    IO,
    Annotated,
    Any,
    NotRequired,  # pydantic does not take the one of typing before Python 3.12
    overload,
)

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from asr_kd.files import Place, place
from asr_kd.shards.foreign import Reading

#: bytes of an index that are parsed at a time
PIECE = 1 << 18
#: letters of a shard's name that are kept where another one is made of it
NAME = 200
#: shards that are objects at a time
BLOCK = 1 << 10
#: before the shards, format and version; in version 2 also where they lie and how they are read
_HEAD = re.compile(
    rb'(\s*\{\s*"format"\s*:\s*"asr_kd-shards"\s*,\s*"version"\s*:\s*[12]\s*,.{0,100000}?)"shards"\s*:\s*\[', re.DOTALL
)
_END = re.compile(rb"\]\s*\}\s*\Z")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What an index says about a shard: file name, samples in it, seconds of audio, size and SHA-256 of the file."""

    name: str
    samples: int
    seconds: float
    bytes: int
    sha256: str

    def at(self, folder: Place | str | Sequence[str]) -> Place:
        """Where the file is; `folder` is what the index was read from."""
        assert isinstance(folder, Place | str)  # of several, every shard is elsewhere
        return place(folder) / self.name


@dataclass(frozen=True, slots=True)
class ShardElsewhere(ShardInfo):
    """A shard that does not lie beside the index that lists it, and perhaps under another name: in the folder `within`, as `file`.

    `reading`: how a tar that others wrote is read; None for one of ours.
    """

    within: str
    file: str
    reading: Reading | None

    def at(self, folder: Place | str | Sequence[str]) -> Place:
        return place(self.within) / self.file


@dataclass(frozen=True)
class Origin:
    """Where shards of a set lie, and how they are read if others wrote them."""

    folder: str
    reading: Reading | None = None


@with_config(ConfigDict(strict=True))
class Row(TypedDict):
    """The same as it stands in an index."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$", max_length=255)]
    samples: Annotated[int, Field(ge=0, lt=1 << 63)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    file: NotRequired[Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f\x7f]+\.(tar|tar\.gz|tgz)$", max_length=255)]]


_ROWS = TypeAdapter(list[Row])
_COLUMNS = itemgetter("name", "samples", "seconds", "bytes", "sha256")


class ShardList(Sequence[ShardInfo]):
    """Shards in order, as columns; each becomes an object when it is asked for.

    Args:
        keys_differ: whether somebody saw that no two utterances have the same key.
    """

    def __init__(self, table: np.ndarray, origins: tuple[Origin, ...] = (), keys_differ: bool = False) -> None:
        self._table, self._origins, self._keys_differ = table, origins, keys_differ

    @classmethod
    def parse(cls, text: bytes | str, origin: Origin | None = None) -> ShardList:
        """The shards of an index, a JSON array, that lie beside it or at `origin`; ValidationError when they are not."""
        read = _ROWS.validate_json(text)
        rows = list(map(_COLUMNS, read))
        width = max(map(len, map(itemgetter(0), rows)), default=1)
        columns = [("name", f"S{width}"), ("samples", "i8"), ("seconds", "f8"), ("bytes", "i8")]
        written = np.array(rows, [*columns, ("sha256", "S64")])
        table = np.empty(len(rows), [*columns, ("sha256", "V32")])
        for name, _ in columns:
            table[name] = written[name]
        table["sha256"] = np.frombuffer(bytes.fromhex(written["sha256"].tobytes().decode()), "V32")
        if origin is None:
            return cls(table)
        return cls(_elsewhere(table, [row.get("file", row["name"]).encode() for row in read]), (origin,))

    @classmethod
    def joined(cls, sets: Sequence[tuple[str, ShardList]]) -> ShardList:
        """The shards of several sets, one after the other; `sets`: the folder and the shards of each.

        A name that several of them have becomes `<name>-<first 8 digits of the shard's SHA-256>.tar`, in each: whatever the order of
        the sets and wherever they lie, so that soft targets under these names stay right. A shard that is there twice keeps its name twice.
        Shards without utterances, which are all alike, are left out.
        """
        tables: list[np.ndarray] = []
        origins: list[Origin] = []
        for folder, every in sets:
            shards = every.filled
            table = shards._table if shards._origins else _elsewhere(shards._table, shards._table["name"])
            table = table.copy()
            table["origin"] += len(origins)
            tables.append(table)
            origins += shards._origins or [Origin(folder)]
        return cls(np.concatenate(tables), tuple(origins), len(sets) == 1 and sets[0][1].keys_differ).named_apart()

    def named_apart(self) -> ShardList:
        """The same, where shards elsewhere that share a name have names of their own, as of `joined`."""
        _, inverse, counts = np.unique(self._table["name"], return_inverse=True, return_counts=True)
        names = self._table["name"].tolist()
        for index in np.flatnonzero(counts[inverse] > 1).tolist():
            names[index] = b"%s-%s.tar" % (names[index][:-4][:NAME], hexlify(self._table["sha256"][index].item())[:8])
        table = np.empty(len(names), [("name", f"S{max(map(len, names), default=1)}"), *self._table.dtype.descr[1:]])
        for column in self._table.dtype.names or ():
            table[column] = names if column == "name" else self._table[column]
        return ShardList(table, self._origins, self._keys_differ)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, index: slice) -> ShardList: ...
    def __getitem__(self, index: int | slice) -> ShardInfo | ShardList:
        return self._of(self._table[index]) if isinstance(index, slice) else self._info(self._table[index].item())

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[ShardInfo]:
        return map(self._info, self._rows(*(self._table.dtype.names or ())))

    def _of(self, table: np.ndarray) -> ShardList:
        return ShardList(table, self._origins, self._keys_differ)

    def _info(self, row: tuple[Any, ...]) -> ShardInfo:
        name, samples, seconds, size, sha256, *elsewhere = row
        info = (name.decode(), samples, seconds, size, sha256.hex())
        if not elsewhere:
            return ShardInfo(*info)
        origin, file = elsewhere
        return ShardElsewhere(*info, self._origins[origin].folder, file.decode(), self._origins[origin].reading)

    def _rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(self), BLOCK):
            yield from self._table[list(columns)][start : start + BLOCK].tolist()

    def __add__(self, other: ShardList) -> ShardList:
        return self._of(np.concatenate([self._table, other._table]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, indices: np.ndarray) -> ShardList:
        """The shards at these positions, or where a mask is true."""
        return self._of(self._table[indices])

    def holding(self, names: np.ndarray, samples: np.ndarray, seconds: np.ndarray) -> ShardList | str:
        """The set as if it held a part of its utterances alone: of these shards so many, of the others none.

        Args:
            names: bytes [shards], each once.
            samples: int [shards]; where it is all of a shard, the shard stays as it is.
            seconds: float [shards], length of those.

        Returns:
            the set; or the name of the first shard that it does not have, or that has fewer utterances.
        """
        if not len(self):
            return str(names[0].decode())
        table = self._table.copy()
        order = np.argsort(table["name"])
        at = order[np.minimum(np.searchsorted(table["name"], names, sorter=order), len(order) - 1)]
        wrong = np.flatnonzero((table["name"][at] != names) | (table["samples"][at] < samples))
        if len(wrong):
            return str(names[wrong[0]].decode())
        part = samples < table["samples"][at]
        rest = np.ones(len(table), bool)
        rest[at] = False
        table["samples"][rest], table["seconds"][rest] = 0, 0.0
        table["samples"][at[part]], table["seconds"][at[part]] = samples[part], seconds[part]
        return self._of(table)

    @property
    def names(self) -> Iterator[str]:
        """File names, in order."""
        return (name.decode() for (name,) in self._rows("name"))

    @property
    def filled(self) -> ShardList:
        """The shards that hold a sample."""
        return self.take(self._table["samples"] > 0)

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return int(self._table["samples"].sum())

    @property
    def without_seconds(self) -> str:
        """The first shard that has utterances and no length in the index, if there is one; else empty."""
        found = np.flatnonzero((self._table["seconds"] <= 0) & (self._table["samples"] > 0))
        return self._table["name"][found[0]].decode() if len(found) else ""

    @property
    def seconds(self) -> float:
        """Seconds of audio of all shards."""
        return float(self._table["seconds"].sum())

    @property
    def keys_differ(self) -> bool:
        """Whether it is known that no two utterances have the same key: an index says so, or they are of one shard, or of one set of ours,
        in which `prepare` has seen to it.
        """
        held = self._table[self._table["samples"] > 0]
        of_sets = np.unique(held["origin"]).tolist() if self._origins else []
        ours = len(of_sets) <= 1 and all(self._origins[one].reading is None for one in of_sets)
        return self._keys_differ or len(held) <= 1 or ours

    def with_keys_apart(self) -> ShardList:
        """The same, of which it is known now that no two utterances have the same key."""
        return ShardList(self._table, self._origins, True)

    @property
    def distinct(self) -> bool:
        """Whether no name is there twice."""
        names = self._table["name"]
        return bool((names[1:] > names[:-1]).all()) or len(np.unique(names)) == len(names)

    @property
    def same(self) -> list[ShardInfo]:
        """Two shards that hold the same utterances, byte for byte, if there are any."""
        first: dict[bytes, int] = {}
        for index, (samples, sha256) in enumerate(self._rows("samples", "sha256")):
            if samples and (known := first.setdefault(sha256, index)) != index:
                return [self[known], self[index]]
        return []

    @property
    def hash(self) -> str:
        """A short hash of names and contents, and of how tars of others are read."""
        digest = hashlib.sha256()
        for origin in self._origins:
            if origin.reading is not None:
                digest.update(json.dumps(dataclasses.asdict(origin.reading), sort_keys=True).encode())
        for name, sha256 in self._rows("name", "sha256"):
            digest.update(b"%s %s\n" % (name, hexlify(sha256)))
        return digest.hexdigest()[:16]


def read_pieces(
    file: IO[bytes], origin: Callable[[dict[str, Any]], Origin | None] = lambda about: None
) -> ShardList | None:
    """The shards of an index laid out as `write_index` does, a piece of it in memory at a time; None for any other file.

    Args:
        origin: what stands before the shards → where they lie, if not beside the index.
    """
    rest = file.read(PIECE)
    if not (head := _HEAD.match(rest)):
        return None
    rest = rest[head.end() :]
    parts = []
    try:
        at = origin(json.loads(head[1].rstrip(b" \t\r\n,") + b"}"))
        while block := file.read(PIECE):
            rest += block
            # a cut elsewhere than between two shards leaves halves that are not JSON
            cut = rest.rfind(b"},") + 1
            if not cut:
                return None
            parts.append(ShardList.parse(b"[" + rest[:cut] + b"]", at))
            rest = rest[cut + 1 :]
        end = _END.search(rest)
        if not end or (parts and not rest[: end.start()].strip()):
            return None
        parts.append(ShardList.parse(b"[" + rest[: end.start()] + b"]", at))
    except (AttributeError, KeyError, TypeError, ValueError):  # those of pydantic and json among them
        return None
    return parts[0]._of(np.concatenate([part._table for part in parts]))


def _elsewhere(table: np.ndarray, files: Any) -> np.ndarray:
    """A table of shards with two columns more: the index of their origin, and the name of their file there."""
    files = np.asarray(files, "S") if len(table) else np.empty(0, "S1")
    wide = np.empty(len(table), [*table.dtype.descr, ("origin", "i4"), ("file", files.dtype)])
    for column in table.dtype.names or ():
        wide[column] = table[column]
    wide["origin"], wide["file"] = 0, files
    return wide
