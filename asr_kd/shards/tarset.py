"""A set of WebDataset tar shards and its index: write, list, read, verify. Member names are keys, never paths to write to."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import parse_json, read_json, sha256_file, write_json, write_whole
from asr_kd.shards.manifest import check_key

FORMAT, VERSION = "asr_kd-shards", 1
AUDIO_EXTENSIONS = ("flac", "wav", "mp3", "ogg", "opus")


@dataclass(frozen=True)
class ShardInfo:
    """A line of the index."""

    name: str
    samples: int
    seconds: float
    bytes: int
    sha256: str


@dataclass
class Sample:
    """An utterance as stored: audio bytes, their extension without a dot, and the fields of its JSON."""

    key: str
    audio: bytes
    extension: str
    fields: dict[str, Any]


def write_members(path: Path | str, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar, whole or not at all; the same members give the same bytes."""
    with write_whole(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(data), 0o644
            file_header = header.tobuf(tarfile.PAX_FORMAT) if len(name.encode()) > 99 or not name.isascii() else header.tobuf()
            tar.fileobj.write(file_header)
            tar.fileobj.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))


def read_members(path: Path | str) -> Iterator[tuple[str, bytes]]:
    """The (name, bytes) of a tar's plain files, in order, read as a stream.

    Raises:
        UserError: when the file is missing, not a tar, or ends before its end mark: a tar cut at a member's edge, which
            Python would read in silence, included.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            length = file.tell()
            file.seek(max(0, length - 2 * tarfile.BLOCKSIZE))
            if length % tarfile.BLOCKSIZE or file.read() != bytes(2 * tarfile.BLOCKSIZE):
                raise UserError(f"{path}: truncated or not a tar shard; copy or make it again")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                end = 0
                for member in tar:
                    if not member.isreg():
                        raise UserError(f"{path}: {member.name!r} is not a plain file; a shard holds files only")
                    content = tar.extractfile(member)
                    data = content.read() if content is not None else b""
                    if len(data) != member.size:
                        raise UserError(f"{path}: truncated within {member.name!r}; copy or make it again")
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    yield member.name, data
                # a header that was overwritten ends Python's reading as if the archive were over
                file.seek(end)
                while block := file.read(1 << 20):
                    if block.strip(b"\0"):
                        raise UserError(f"{path}: corrupt after {end:,} bytes; copy or make it again")
    except FileNotFoundError:
        raise UserError(f"{path}: no such shard; the set is incomplete, copy or make it again") from None
    except (tarfile.TarError, EOFError, OverflowError, UnicodeError) as error:
        raise UserError(f"{path}: corrupt tar shard ({error}); copy or make it again") from None


def read_shard(path: Path | str) -> Iterator[Sample]:
    """The samples of an audio shard, in order.

    Raises:
        UserError: when the shard is damaged, a sample lacks audio or JSON, or a key occurs twice.
    """
    seen: set[str] = set()
    held: tuple[str, dict[str, bytes]] | None = None
    for name, data in read_members(path):
        key, _, extension = name.partition(".")
        check_key(key, f"{path}")
        if held is not None and held[0] != key:
            yield _sample(path, *held)
            held = None
        if held is None:
            if key in seen:
                raise UserError(f"{path}: the key {key} occurs twice; make the shard again")
            seen.add(key)
            held = key, {}
        held[1][extension.lower()] = data
    if held is not None:
        yield _sample(path, *held)


def _sample(path: Path | str, key: str, parts: dict[str, bytes]) -> Sample:
    audio = [extension for extension in AUDIO_EXTENSIONS if extension in parts]
    if len(audio) != 1 or "json" not in parts:
        raise UserError(f"{path}: {key} needs one audio member ({', '.join(AUDIO_EXTENSIONS)}) and a json; it has {', '.join(sorted(parts))}")
    fields = parse_json(parts["json"].decode("utf-8", "replace"), f"{path}: {key}.json")
    if not isinstance(fields, dict):
        raise UserError(f"{path}: {key}.json: must be a JSON object")
    if not isinstance(fields.get("text", ""), str):
        raise UserError(f"{path}: {key}.json: text must be a string, not {fields['text']!r}")
    return Sample(key, parts[audio[0]], audio[0], fields)


def write_shard(path: Path | str, samples: Iterable[Sample]) -> ShardInfo:
    """Write an audio shard, whole or not at all, and describe it; hours are counted from the fields' `seconds`."""
    path = Path(path)
    count, seconds = 0, 0.0

    def members() -> Iterator[tuple[str, bytes]]:
        nonlocal count, seconds
        for sample in samples:
            count += 1
            seconds += float(sample.fields.get("seconds", 0.0))
            yield f"{sample.key}.{sample.extension}", sample.audio
            yield f"{sample.key}.json", json.dumps(sample.fields, ensure_ascii=False).encode()

    write_members(path, members())
    return ShardInfo(path.name, count, round(seconds, 3), path.stat().st_size, sha256_file(path))


def shard_name(number: int) -> str:
    """Name of a set's shard."""
    return f"shard-{number:06d}.tar"


def write_index(folder: Path | str, shards: list[ShardInfo]) -> None:
    """Write a set's index: last of all, for without it there is no set."""
    write_json(Path(folder) / "index.json", {"format": FORMAT, "version": VERSION, "shards": [asdict(shard) for shard in shards]})


def read_index(folder: Path | str) -> list[ShardInfo]:
    """A set's shards.

    Raises:
        UserError: when the folder holds no set, or its index is damaged or of another version.
    """
    where = Path(folder) / "index.json"
    if not where.exists():
        raise UserError(f"{folder}: holds no index.json, so it is no set of shards; make one with `asr-kd prepare`")
    index = read_json(where, "index")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{where}: not an index of asr_kd shards; make the set with `asr-kd prepare`")
    if index.get("version") != VERSION:
        raise UserError(f"{where}: index version {index.get('version')}, this program reads {VERSION}; use a matching asr_kd")
    try:
        shards = [ShardInfo(**line) for line in index["shards"]]
        for shard in shards:
            check_key(shard.name.removesuffix(".tar"), str(where))
            if not (isinstance(shard.samples, int) and isinstance(shard.bytes, int) and isinstance(shard.sha256, str)):
                raise TypeError
            float(shard.seconds)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{where}: damaged index; make the set again") from None
    return shards


def check_shard(folder: Path | str, shard: ShardInfo) -> None:
    """Compare a shard with its line of the index.

    Raises:
        UserError: when it is missing or its bytes are others than when the index was written.
    """
    path = Path(folder) / shard.name
    if not path.is_file():
        raise UserError(f"{path}: is in the index but not there; copy or make the set again")
    if path.stat().st_size != shard.bytes or sha256_file(path) != shard.sha256:
        raise UserError(f"{path}: its bytes differ from the index (damaged or changed); copy or make the set again")
