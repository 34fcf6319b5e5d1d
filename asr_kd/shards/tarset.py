"""A set of WebDataset tar shards and its index: write, list, read, verify."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from asr_kd.audio.decode import EXTENSIONS
from asr_kd.errors import UserError
from asr_kd.files import parse_json, read_json, sha256_file, write_json, write_whole
from asr_kd.shards.manifest import check_key

FORMAT, VERSION, INDEX = "asr_kd-shards", 1, "index.json"
BLOCK = tarfile.BLOCKSIZE


@with_config(ConfigDict(strict=True))
@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What an index says about a shard: file name, samples in it, seconds of audio, size and SHA-256 of the file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")]
    samples: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass
class Sample:
    """An utterance of a shard: the bytes of its audio file, their kind (`flac`, …), and what is known about it.

    `fields` holds `seconds`, `text` unless it is unlabelled, and whatever else the source knew.
    """

    key: str
    audio: bytes
    extension: str
    fields: dict[str, Any]


def read_members(path: Path | str) -> Iterator[tuple[str, bytes]]:
    """The members of a tar, in order: name and content.

    Raises:
        UserError: when the file is missing, not a tar, truncated or damaged, or a member is not a plain file or its name
            is not `<key>.<extension>`.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            yield from _members(path, file, path.stat().st_size)
    except FileNotFoundError:
        raise UserError(f"{path}: no such shard; check the path, or make the shards again") from None
    except (IsADirectoryError, PermissionError, NotADirectoryError) as error:
        raise UserError(
            f"{path}: this shard cannot be read ({error.strerror}); check the path and its permissions"
        ) from None


def _members(path: Path, file: io.BufferedReader, size: int) -> Iterator[tuple[str, bytes]]:
    damaged = f"{path}: truncated or damaged tar"
    remedy = "fetch or make this shard again"
    end = 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 — `file` is closed by the caller
        while member := tar.next():
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            check_name(member.name, f"{path}: the member")
            if not member.isreg() or member.issparse():
                raise UserError(f"{path}: the member {member.name} is not a plain file; {remedy}")
            if end > size:
                raise UserError(f"{damaged} ({member.name} needs {end - size} bytes more); {remedy}")
            file.seek(member.offset_data)
            yield member.name, file.read(member.size)
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError, EOFError) as error:
        raise UserError(f"{damaged} ({error}); {remedy}") from None
    # tarfile takes a damaged header or a cut for the end; a whole tar ends in two blocks of zeros, and nothing else
    file.seek(end)
    zeros = 0
    while block := file.read(1 << 16):
        zeros += len(block)
        if block.strip(b"\0"):
            raise UserError(f"{damaged} (what follows byte {end} is not a member); {remedy}")
    if zeros < 2 * BLOCK or size % BLOCK:
        raise UserError(f"{damaged} (the end of the archive is missing); {remedy}")


def check_name(name: str, where: str) -> tuple[str, str]:
    """Split the name of a member at its first dot.

    Returns:
        key and extension.

    Raises:
        UserError: when it is not `<key>.<extension>`: names of members are keys, never paths.
    """
    key, _, extension = name.partition(".")
    check_key(key, f"{where} {name!a}")
    if not re.fullmatch(r"[A-Za-z0-9]+(\.[A-Za-z0-9]+)*", extension):
        raise UserError(f"{where} {name!a}: must be named <key>.<extension>, with no dot in the key")
    return key, extension


def write_members(path: Path | str, members: Iterable[tuple[str, bytes]]) -> None:
    """Publish a tar of these members, whole or not at all: the same members give the same bytes.

    Raises:
        UserError: when a name is not `<key>.<extension>`.
    """
    with (
        write_whole(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar,
    ):
        for name, data in members:
            check_name(name, f"{path}: the member")
            header = tarfile.TarInfo(name)  # of nobody, from 1970: the bytes depend on the content alone
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def read_shard(path: Path | str) -> Iterator[Sample]:
    """The utterances of an audio shard, in order.

    Raises:
        UserError: as `read_members`, and when an utterance lacks its audio or its JSON, has either twice, comes back
            later, or its JSON is not what a shard holds.
    """
    seen: set[str] = set()
    key, parts = "", dict[str, bytes]()
    for name, data in read_members(path):
        head, extension = check_name(name, f"{path}: the member")
        extension = extension.lower()
        if extension != "json" and extension not in EXTENSIONS:
            raise UserError(
                f"{path}: the member {name} is neither audio ({', '.join(EXTENSIONS)}) nor .json; make this shard again"
            )
        if head != key:
            if parts:
                yield _sample(path, key, parts)
            if head in seen:
                raise UserError(f"{path}: the key {head} is there twice; make this shard again with keys that differ")
            seen.add(head)
            key, parts = head, {}
        if extension in parts:
            raise UserError(f"{path}: the member {name} is there twice; make this shard again with keys that differ")
        parts[extension] = data
    if parts:
        yield _sample(path, key, parts)


def _sample(path: Path | str, key: str, parts: dict[str, bytes]) -> Sample:
    audio = [extension for extension in parts if extension != "json"]
    if len(audio) != 1:
        found = " and ".join(f"{key}.{extension}" for extension in audio) or "none"
        raise UserError(f"{path}: {key} must have one audio member, found {found}; make this shard again")
    if "json" not in parts:
        raise UserError(f"{path}: {key}.{audio[0]} has no {key}.json beside it; make this shard again")
    try:
        text = parts["json"].decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: {key}.json is not UTF-8 text; make this shard again") from None
    fields = parse_json(text, f"{path}: {key}.json")
    _check_fields(fields, f"{path}: {key}.json")
    return Sample(key, parts[audio[0]], audio[0], fields)


def _check_fields(fields: Any, where: str) -> None:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: must be a JSON object, not {ascii(fields)[:60]}; make this shard again")
    text, seconds = fields.get("text"), fields.get("seconds", 0.0)
    if "text" in fields and not isinstance(text, str):
        raise UserError(f"{where}: `text` must be text, not {ascii(text)[:60]}; leave it out when it is unknown")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise UserError(
            f"{where}: `seconds` must be a length in seconds, not {ascii(seconds)[:60]}; make this shard again"
        )


def write_shard(path: Path | str, samples: Iterable[Sample]) -> ShardInfo:
    """Publish an audio shard, whole or not at all.

    Returns:
        what the index says about it; `seconds` is the sum over its samples.

    Raises:
        UserError: when a key is there twice or cannot be a key, the extension is not of audio, or the fields are not JSON.
    """
    path = Path(path)
    seconds: list[float] = []
    seen: set[str] = set()

    def members() -> Iterator[tuple[str, bytes]]:
        for sample in samples:
            where = f"{path}: {sample.key!a}"
            check_key(sample.key, str(path))
            if sample.key in seen:
                raise UserError(f"{path}: the key {sample.key} is there twice; keys must differ")
            if sample.extension not in EXTENSIONS:
                raise UserError(f"{where}: {sample.extension} is not a kind of audio ({', '.join(EXTENSIONS)})")
            _check_fields(sample.fields, where)
            try:
                fields = json.dumps(sample.fields, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{where}: its fields cannot be written as JSON ({error}); mend or remove them"
                ) from None
            seen.add(sample.key)
            seconds.append(float(sample.fields.get("seconds", 0.0)))
            yield f"{sample.key}.{sample.extension}", sample.audio
            yield f"{sample.key}.json", fields

    write_members(path, members())
    return ShardInfo(path.name, len(seconds), round(math.fsum(seconds), 6), path.stat().st_size, sha256_file(path))


@with_config(ConfigDict(strict=True, extra="forbid"))
@dataclass
class _Index:
    format: Literal["asr_kd-shards"]
    version: Annotated[int, Field(ge=1, le=VERSION)]
    shards: list[ShardInfo]


_INDEX, _INFOS = TypeAdapter(_Index), TypeAdapter(list[ShardInfo])


def read_index(folder: Path | str) -> list[ShardInfo]:
    """The shards of a set, as its index lists them.

    Raises:
        UserError: when there is no index, it is damaged or of a newer version.
    """
    path = Path(folder) / INDEX
    if not path.exists():
        what = "no such folder of shards" if not Path(folder).is_dir() else f"holds no shards ({INDEX} is missing)"
        raise UserError(f"{folder}: {what}; check the path, or finish `asr-kd prepare`")
    try:
        # straight from the bytes: a million shards fit into a few hundred megabytes as long as they are not dicts before
        return _distinct(path, _INDEX.validate_json(path.read_bytes()).shards)
    except (OSError, ValidationError):
        pass  # what is wrong with it is told below
    value = read_json(path, "index of shards")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path}: not an index of audio shards; make it with `asr-kd prepare`")
    version = value.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(f"{path}: of version {version}, this program reads {VERSION}; use a newer asr_kd")
    try:
        infos = _INFOS.validate_json(json.dumps(value.get("shards")))  # as JSON: strict would want ShardInfo objects
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(["shards", *map(str, first["loc"])])
        raise UserError(f"{path}: {place}: {first['msg'].lower()}; make the shards again") from None
    return _distinct(path, infos)


def _distinct(path: Path, infos: list[ShardInfo]) -> list[ShardInfo]:
    if len({info.name for info in infos}) < len(infos):
        raise UserError(f"{path}: lists a shard twice; make the shards again")
    return infos


def shard_name(number: int) -> str:
    """File name of a shard of a set."""
    return f"shard-{number:06d}.tar"


def write_index(folder: Path | str, infos: list[ShardInfo]) -> None:
    """Publish the index of a set of shards; this comes last and makes the set whole."""
    shards = [dataclasses.asdict(info) for info in infos]
    write_json(Path(folder) / INDEX, {"format": FORMAT, "version": VERSION, "shards": shards})


def check_shard(folder: Path | str, info: ShardInfo) -> None:
    """Compare a shard with what the index says about it.

    Raises:
        UserError: when it is missing, or its size or SHA-256 differs.
    """
    path = Path(folder) / info.name
    remedy = "fetch it again, or remove it and run `asr-kd prepare` again"
    if not path.is_file():
        raise UserError(f"{path}: this shard is in {INDEX}, but not there; {remedy}")
    size = path.stat().st_size
    if size != info.bytes:
        raise UserError(f"{path}: has {size} bytes, {INDEX} says {info.bytes}; {remedy}")
    if sha256_file(path) != info.sha256:
        raise UserError(f"{path}: its SHA-256 differs from {INDEX}; {remedy}")
