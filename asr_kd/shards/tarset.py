"""A set of WebDataset tar shards and its index: write, list, read, verify."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from pydantic import ValidationError

from asr_kd.audio.decode import EXTENSIONS
from asr_kd.errors import UserError
from asr_kd.files import Place, local_copy, parse_json, place, read_json, readable, sha256_file, write_whole
from asr_kd.shards.index import ShardInfo, ShardList, read_pieces
from asr_kd.shards.light import webdataset
from asr_kd.shards.manifest import KEY_BYTES, LATEST, check_key, check_unpacked, shown

FORMAT, VERSION, INDEX = "asr_kd-shards", 1, "index.json"
BLOCK = tarfile.BLOCKSIZE
#: where a header says that it is one
_MAGIC = 257
#: header of a plain file in which nothing is unusual: name, size and checksum, and fields that do not matter here
_PLAIN = re.compile(rb"(.{100}).{24}([0-7]{11})\0.{12}([0-7]{6})\0 0.{100}ustar\x0000.{80}\0.{166}", re.DOTALL)
_EXTENSION = re.compile(r"[A-Za-z0-9]+(\.[A-Za-z0-9]+)*")
#: a name of a member that is certainly right
_NAME = re.compile(rf"([A-Za-z0-9_-]{{1,{KEY_BYTES}}})\.({_EXTENSION.pattern})")

#: what macOS puts into a tar beside the files: their attributes, and how a folder was looked at
_OF_MACOS = re.compile(r"\._|\.DS_Store$")


@dataclass
class Sample:
    """An utterance of a shard: the bytes of its audio file, their kind (`flac`, …), and what is known about it.

    `fields` holds `seconds`, `text` unless it is unlabelled, and whatever else the source knew.
    """

    key: str
    audio: bytes
    extension: str
    fields: dict[str, Any]


#: bytes at the head of an object that are asked for to read its first member; more where it is longer
HEAD = 1 << 16


def read_members(path: Place | str, copy: Path | None = None) -> Iterator[tuple[str, bytes]]:
    """The members of a tar, in order: name and content; `copy` is where its bytes lie if they were fetched already.

    Raises:
        UserError: when the file is missing, not a tar, truncated or damaged, or a member is not a plain file or its name
            is not `<key>.<extension>`.
    """
    path = place(path)
    with _readable(path), local_copy(copy or path) as bytes_of, open(bytes_of, "rb") as file:
        yield from _members(path, file, bytes_of.stat().st_size)


def _readable(path: Place) -> AbstractContextManager[None]:
    return readable(path, "shard", "check the path, or make the shards again")


def first_member(path: Place | str) -> tuple[str, bytes] | None:
    """The first member of a tar alone, as `read_members`; of an object, no more than its head is fetched."""
    path = place(path)
    if isinstance(path, Path):
        return next(iter(read_members(path)), None)
    size = HEAD
    while True:
        with _readable(path):
            data = path.read_bytes(size)
        try:
            return next(iter(_members(path, io.BytesIO(data), len(data))), None)
        except UserError:
            if len(data) < size:  # that was all of it
                raise
        size *= 16


def _members(path: Place, file: IO[bytes], size: int) -> Iterator[tuple[str, bytes]]:
    damaged = f"{path}: truncated or damaged tar"
    remedy = "fetch or make this shard again"
    end = 0
    try:
        check_unpacked(file.read(6), path, f", and write its bytes and SHA-256 into {INDEX}")
        file.seek(0)
        for name, length, plain in _headers(file):
            start = file.tell()
            end = start + -(-length // BLOCK) * BLOCK
            name = name.removeprefix("./")  # as `tar cf x.tar .` writes them
            if (plain is None and "." not in name.strip("./")) or _OF_MACOS.match(name):
                file.seek(end)
                continue
            check_name(name, f"{path}: the member")
            if not plain:
                raise UserError(f"{path}: the member {name} is not a plain file; {remedy}")
            if end > size:
                raise UserError(f"{damaged} ({name} needs {end - size} bytes more); {remedy}")
            yield name, file.read(length)
            file.seek(end)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError, EOFError) as error:
        raise UserError(f"{damaged} ({error}); {remedy}") from None
    # tarfile takes a damaged header or a cut for the end; a whole tar ends in two blocks of zeros, and nothing else
    file.seek(end)
    zeros = 0
    while block := file.read(1 << 16):
        zeros += len(block)
        if rest := block.lstrip(b"\0"):
            if rest[_MAGIC:].startswith(b"ustar") and zeros - len(rest) >= 2 * BLOCK:
                raise UserError(
                    f"{path}: several tars joined into one (the second begins at byte {file.tell() - len(rest)}); make each a shard of its own"
                )
            raise UserError(f"{damaged} (what follows byte {end} is not a member); {remedy}")
    if zeros < 2 * BLOCK or size % BLOCK:
        raise UserError(f"{damaged} (the end of the archive is missing); {remedy}")


def _headers(file: IO[bytes]) -> Iterator[tuple[str, int, bool | None]]:
    """Of each member of a tar its name, its size and whether it is a plain file; None for a folder.

    The file stands where the member's content begins when this yields, and must stand at the next header when this goes on.
    """
    while True:
        at = file.tell()
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            return
        # What we write is read here, in a fifth of the time that tarfile takes; whatever else a tar may hold, there.
        fields = _PLAIN.fullmatch(header)
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if not fields or checksum != int(fields[3], 8) or not fields[1].isascii():
            break
        yield fields[1].partition(b"\0")[0].decode("ascii"), int(fields[2], 8), True
    file.seek(at)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
        while member := tar.next():
            file.seek(member.offset_data)
            yield member.name, member.size, None if member.isdir() else member.isreg() and not member.issparse()
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen


def check_name(name: str, where: str) -> tuple[str, str]:
    """Key and extension of a member; UserError when its name is not `<key>.<extension>`: names are keys, never paths."""
    if plain := _NAME.fullmatch(name):
        return plain[1], plain[2]
    key, _, extension = name.partition(".")
    check_key(key, f"{where} {name!a}")
    if not _EXTENSION.fullmatch(extension):
        raise UserError(f"{where} {name!a}: must be named <key>.<extension>, with no dot in the key")
    return key, extension


def write_members(path: Place | str, members: Iterable[tuple[str, bytes]]) -> tuple[int, str]:
    """Publish a tar of these members, whole or not at all, and return its size in bytes and its SHA-256.

    The same members give the same bytes; UserError when a name is not `<key>.<extension>`.
    """
    nobody = {"mtime": 0, "user": "", "group": "", "mode": 0o644}  # from 1970: the bytes depend on the content alone
    with write_whole(path, "w+b", make_folder=False) as file:
        with webdataset().TarWriter(file, encoder=False, format="PAX_FORMAT", **nobody) as tar:
            for name, data in members:
                key, extension = check_name(name, f"{path}: the member")
                tar.write({"__key__": key, extension: data})  # one at a time: those of a sample it would sort
        size = file.tell()
        file.seek(0)
        return size, hashlib.file_digest(cast(io.BufferedRandom, file), "sha256").hexdigest()


def read_shard(path: Place | str, copy: Path | None = None) -> Iterator[Sample]:
    """The utterances of an audio shard, in order; `copy` as of `read_members`.

    Raises:
        UserError: as `read_members`, and when an utterance lacks its audio or its JSON, has either twice, comes back
            later, or its JSON is not what a shard holds.
    """
    seen: set[str] = set()
    name = ""

    def files() -> Iterator[dict[str, Any]]:
        nonlocal name
        for name, data in read_members(path, copy):
            extension = check_name(name, f"{path}: the member")[1].lower()
            if extension != "json" and extension not in EXTENSIONS:
                raise UserError(
                    f"{path}: the member {name} is neither audio ({', '.join(EXTENSIONS)}) nor .json (a key ends at its first dot); make this shard again"
                )
            yield {"fname": name, "data": data, "__url__": path}

    def refuse(_: Exception) -> NoReturn:  # what may be wrong with a file by itself was found before
        raise UserError(f"{path}: the member {name} is there twice; make this shard again with other keys") from None

    for parts in webdataset().tariterators.group_by_keys(files(), handler=refuse):
        key = parts["__key__"]
        if key in seen:
            raise UserError(f"{path}: the key {key} is there twice; make this shard again with keys that differ")
        seen.add(key)
        yield _sample(path, key, parts)


def _sample(path: Place | str, key: str, parts: dict[str, bytes]) -> Sample:
    audio = [extension for extension in EXTENSIONS if extension in parts]
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
    if "\\ud" in text.lower() and any("\ud800" <= mark <= "\udfff" for mark in json.dumps(fields, ensure_ascii=False)):
        raise UserError(f"{path}: {key}.json holds half a character (a lone surrogate); make this shard again")
    _check_fields(fields, f"{path}: {key}.json")
    return Sample(key, parts[audio[0]], audio[0], fields)


def _check_fields(fields: Any, where: str) -> None:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: must be a JSON object, not {shown(fields)}; make this shard again")
    text, seconds = fields.get("text"), fields.get("seconds", 0.0)
    if "text" in fields and not isinstance(text, str):
        raise UserError(f"{where}: `text` must be text, not {shown(text)}; leave it out when it is unknown")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < LATEST:
        raise UserError(f"{where}: `seconds` must be a length in seconds, not {shown(seconds)}; make this shard again")


def write_shard(path: Place | str, samples: Iterable[Sample]) -> ShardInfo:
    """Publish an audio shard, whole or not at all, and return what the index says about it.

    It raises UserError when a key is there twice or cannot be one, the extension is not of audio, or the fields are not JSON.
    """
    path = place(path)
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
                    f"{where}: its fields cannot be written as JSON ({error}); fix or remove them"
                ) from None
            seen.add(sample.key)
            seconds.append(float(sample.fields.get("seconds", 0.0)))
            yield f"{sample.key}.{sample.extension}", sample.audio
            yield f"{sample.key}.json", fields

    size, sha256 = write_members(path, members())
    return ShardInfo(path.name, len(seconds), round(math.fsum(seconds), 6), size, sha256)


def read_index(folder: Place | str) -> ShardList:
    """The shards of a set, as its index lists them; UserError when it is missing, damaged or of a newer version."""
    folder = place(folder)
    path = folder / INDEX
    if not path.exists():
        what = "no such folder of shards" if not folder.is_dir() else f"holds no shards ({INDEX} is missing)"
        raise UserError(f"{folder}: {what}; check the path, or finish `asr-kd prepare`")
    shards = None
    with suppress(OSError), local_copy(path) as copy, open(copy, "rb") as file:
        shards = read_pieces(file)
    if shards is None:  # laid out otherwise, or damaged: as a whole it takes more memory, and shows what is wrong
        shards = _read_whole(path)
    if not shards.distinct:
        raise UserError(f"{path}: lists a shard twice; make the shards again")
    return shards


def _read_whole(path: Place) -> ShardList:
    value = read_json(path, "index of shards")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path}: not an index of audio shards; make it with `asr-kd prepare`")
    version = value.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(f"{path}: of version {version}, this program reads {VERSION}; use a newer asr_kd")
    try:
        return ShardList.parse(json.dumps(value.get("shards")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["shards", *map(str, first["loc"])])
        raise UserError(f"{path}: {where}: {first['msg'].lower()}; make the shards again") from None


def shard_name(number: int) -> str:
    """File name of a shard of a set."""
    return f"shard-{number:06d}.tar"


def write_index(folder: Place | str, infos: Iterable[ShardInfo]) -> None:
    """Publish the index of a set of shards, a line each; this comes last and makes the set whole."""
    with write_whole(place(folder) / INDEX, "w", make_folder=False) as file:
        file.write(f'{{"format": "{FORMAT}", "version": {VERSION}, "shards": [')
        for number, info in enumerate(infos):
            file.write((",\n" if number else "\n") + json.dumps(dataclasses.asdict(info)))
        file.write("\n]}\n")


def read_checked(folder: Place | str, info: ShardInfo) -> Iterator[Sample]:
    """The utterances of a shard, in order, once it was compared with what the index says; from a store it is fetched once.

    It raises UserError when it is missing, its size or SHA-256 differs, and as `read_shard`.
    """
    path = place(folder) / info.name
    remedy = "fetch it again, or remove it and run `asr-kd prepare` again"
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(local_copy(path))
            size = copy.stat().st_size if copy.is_file() else None
        except FileNotFoundError:
            size = None
        if size is None:
            raise UserError(f"{path}: this shard is in {INDEX}, but not there; {remedy}")
        if size != info.bytes:
            raise UserError(f"{path}: has {size} bytes, {INDEX} says {info.bytes}; {remedy}")
        if sha256_file(copy) != info.sha256:
            raise UserError(f"{path}: its SHA-256 differs from {INDEX}; {remedy}")
        yield from read_shard(path, copy)
