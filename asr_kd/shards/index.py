"""What an index says about the shards of a set, a million of them in a hundred megabytes."""

from __future__ import annotations

import hashlib
import re
from binascii import hexlify
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import IO, Annotated, Any, overload

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic does not take the one of typing before Python 3.12

#: bytes of an index that are parsed at a time
PIECE = 1 << 18
#: shards that are objects at a time
BLOCK = 1 << 10
_HEAD = re.compile(rb'\s*\{\s*"format"\s*:\s*"asr_kd-shards"\s*,\s*"version"\s*:\s*1\s*,\s*"shards"\s*:\s*\[')
_END = re.compile(rb"\]\s*\}\s*\Z")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What an index says about a shard: file name, samples in it, seconds of audio, size and SHA-256 of the file."""

    name: str
    samples: int
    seconds: float
    bytes: int
    sha256: str


@with_config(ConfigDict(strict=True))
class Row(TypedDict):
    """The same as it stands in an index."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$", max_length=255)]
    samples: Annotated[int, Field(ge=0, lt=1 << 63)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_ROWS = TypeAdapter(list[Row])
_COLUMNS = itemgetter("name", "samples", "seconds", "bytes", "sha256")


class ShardList(Sequence[ShardInfo]):
    """Shards in order, as columns; each becomes an object when it is asked for."""

    def __init__(self, table: np.ndarray) -> None:
        self._table = table

    @classmethod
    def parse(cls, text: bytes | str) -> ShardList:
        """The shards of an index, a JSON array; ValidationError when they are not."""
        rows = list(map(_COLUMNS, _ROWS.validate_json(text)))
        width = max(map(len, map(itemgetter(0), rows)), default=1)
        columns = [("name", f"S{width}"), ("samples", "i8"), ("seconds", "f8"), ("bytes", "i8")]
        written = np.array(rows, [*columns, ("sha256", "S64")])
        table = np.empty(len(rows), [*columns, ("sha256", "V32")])
        for name, _ in columns:
            table[name] = written[name]
        table["sha256"] = np.frombuffer(bytes.fromhex(written["sha256"].tobytes().decode()), "V32")
        return cls(table)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, index: slice) -> ShardList: ...
    def __getitem__(self, index: int | slice) -> ShardInfo | ShardList:
        return ShardList(self._table[index]) if isinstance(index, slice) else _info(self._table[index].item())

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[ShardInfo]:
        return map(_info, self._rows("name", "samples", "seconds", "bytes", "sha256"))

    def _rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(self), BLOCK):
            yield from self._table[list(columns)][start : start + BLOCK].tolist()

    def __add__(self, other: ShardList) -> ShardList:
        return ShardList(np.concatenate([self._table, other._table]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, indices: np.ndarray) -> ShardList:
        """The shards at these positions, or where a mask is true."""
        return ShardList(self._table[indices])

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
    def distinct(self) -> bool:
        """Whether no name is there twice."""
        names = self._table["name"]
        return bool((names[1:] > names[:-1]).all()) or len(np.unique(names)) == len(names)

    @property
    def hash(self) -> str:
        """A short hash of names and contents."""
        digest = hashlib.sha256()
        for name, sha256 in self._rows("name", "sha256"):
            digest.update(b"%s %s\n" % (name, hexlify(sha256)))
        return digest.hexdigest()[:16]


def read_pieces(file: IO[bytes]) -> ShardList | None:
    """The shards of an index laid out as `write_index` does, a piece of it in memory at a time; None for any other file."""
    rest = file.read(PIECE)
    if not (head := _HEAD.match(rest)):
        return None
    rest = rest[head.end() :]
    parts = []
    try:
        while block := file.read(PIECE):
            rest += block
            # a cut elsewhere than between two shards leaves halves that are not JSON
            cut = rest.rfind(b"},") + 1
            if not cut:
                return None
            parts.append(ShardList.parse(b"[" + rest[:cut] + b"]"))
            rest = rest[cut + 1 :]
        end = _END.search(rest)
        if not end or (parts and not rest[: end.start()].strip()):
            return None
        parts.append(ShardList.parse(b"[" + rest[: end.start()] + b"]"))
    except ValidationError:
        return None
    return ShardList(np.concatenate([part._table for part in parts]))


def _info(row: tuple[Any, ...]) -> ShardInfo:
    name, samples, seconds, size, sha256 = row
    return ShardInfo(name.decode(), samples, seconds, size, sha256.hex())
