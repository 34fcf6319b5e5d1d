"""A set of WebDataset tar shards and its index: write, list, read, verify."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import posixpath
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from asr_kd.audio.decode import EXTENSIONS
from asr_kd.errors import UserError
from asr_kd.files import (
    Place,
    clear_errors,
    local_copy,
    parse_json,
    place,
    readable,
    sha256_file,
    write_whole,
)
from asr_kd.shards.foreign import Account, foreign_key, foreign_samples, parts_of
from asr_kd.shards.index import ShardElsewhere, ShardInfo
from asr_kd.shards.index_file import INDEX as INDEX
from asr_kd.shards.index_file import read_index as read_index
from asr_kd.shards.index_file import write_index as write_index
from asr_kd.shards.light import webdataset
from asr_kd.shards.manifest import KEY_BYTES, LATEST, check_key, check_unpacked, shown

BLOCK = tarfile.BLOCKSIZE
_REMEDY = "fetch or make this shard again"
#: the first bytes of a file packed by gzip
GZIP = b"\x1f\x8b"
#: where a header says that it is one
_MAGIC = 257
#: header of a plain file in which nothing is unusual: name, size and checksum, and fields that do not matter here
_PLAIN = re.compile(rb"(.{100}).{24}([0-7]{11})\0.{12}([0-7]{6})\0 0.{100}ustar\x0000.{80}\0.{166}", re.DOTALL)
_EXTENSION = re.compile(r"[A-Za-z0-9]+(\.[A-Za-z0-9]+)*")
#: a name of a member that is certainly right
_NAME = re.compile(rf"([A-Za-z0-9_-]{{1,{KEY_BYTES}}})\.({_EXTENSION.pattern})")

#: what macOS puts into a tar beside the files: their attributes, and how a folder was looked at
OF_MACOS = re.compile(r"\._|\.DS_Store$")


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


def read_members(path: Place | str, copy: Path | None = None, foreign: bool = False) -> Iterator[tuple[str, bytes]]:
    """The members of a tar, in order: name and content; `copy` is where its bytes lie if they were fetched already.

    With `foreign`, for tars that others wrote, names are whatever they are, and a tar packed by gzip is unpacked on the way.

    Raises:
        UserError: when the file is missing, not a tar, truncated or damaged, or a member is not a plain file or (unless `foreign`)
            its name is not `<key>.<extension>`.
    """
    path = place(path)
    with _opened(path, copy, foreign) as file:
        yield from ((name, file.read(length)) for name, length in _members(path, file, foreign))


@contextmanager
def _opened(path: Place, copy: Path | None, foreign: bool) -> Iterator[IO[bytes]]:
    with ExitStack() as stack:
        stack.enter_context(_readable(path))
        file: IO[bytes] = stack.enter_context(open(stack.enter_context(local_copy(copy or path)), "rb"))
        if foreign and file.read(2) == GZIP:
            file = stack.enter_context(_unpacked(path, file))
        yield file


@contextmanager
def _unpacked(path: Place, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """A file packed by gzip, unpacked into a temporary one."""
    file.seek(0)
    with clear_errors(Path(tempfile.gettempdir()) / path.name), tempfile.TemporaryFile() as whole:
        try:
            shutil.copyfileobj(gzip.GzipFile(fileobj=file), whole)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: truncated or damaged gzip file ({error}); fetch it again") from None
        yield whole


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
        file = io.BytesIO(data)
        try:
            return next(((name, file.read(length)) for name, length in _members(path, file)), None)
        except UserError:
            if len(data) < size:  # that was all of it
                raise
        size *= 16


def _members(path: Place, file: IO[bytes], foreign: bool = False) -> Iterator[tuple[str, int]]:
    """The name and the size of each member; the file stands where its content begins when this yields."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    check_unpacked(
        file.read(6), path, ", and index it anew" if foreign else f", and write its bytes and SHA-256 into {INDEX}"
    )
    for name, length, plain in scan(path, file, size):
        folder = plain is None and (foreign or "." not in name.strip("./"))
        if folder or OF_MACOS.match(posixpath.basename(name) if foreign else name):
            continue
        if not foreign:
            check_name(name, f"{path}: the member")
        if not plain:
            raise UserError(f"{path}: the member {name} is not a plain file; {_REMEDY}")
        yield name, length


def scan(path: Place, file: IO[bytes], size: int) -> Iterator[tuple[str, int, bool | None]]:
    """Of each member of a tar of `size` bytes its name, its size and whether it is a plain file; None for a folder.

    The file stands where the member's content begins when this yields. UserError when it is no whole tar.
    """
    damaged = f"{path}: truncated or damaged tar"
    end = 0
    file.seek(0)
    try:
        for name, length, plain in _headers(file):
            end = file.tell() + -(-length // BLOCK) * BLOCK
            if end > size:
                raise UserError(f"{damaged} ({name} needs {end - size} bytes more); {_REMEDY}")
            yield name.removeprefix("./"), length, plain  # as `tar cf x.tar .` writes them
            file.seek(end)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError, EOFError) as error:
        raise UserError(f"{damaged} ({error}); {_REMEDY}") from None
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
            raise UserError(f"{damaged} (what follows byte {end} is not a member); {_REMEDY}")
    if zeros < 2 * BLOCK or size % BLOCK:
        raise UserError(f"{damaged} (the end of the archive is missing); {_REMEDY}")


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


def shard_name(number: int) -> str:
    """File name of a shard of a set."""
    return f"{shard_stem(number)}.tar"


def shard_stem(number: int) -> str:
    """The same without its ending."""
    return f"shard-{number:06d}"


def read_listed(folder: Place | str | Sequence[str], info: ShardInfo, copy: Path | None = None) -> Iterator[Sample]:
    """The utterances of a shard of an index, in order, not compared with it; `folder` and UserError as of `read_checked`, `copy` as of `read_members`."""
    path = info.at(folder)
    if isinstance(info, ShardElsewhere) and info.reading is not None:
        members = read_members(path, copy, foreign=True)
        yield from (Sample(*one) for one in foreign_samples(path, members, info.reading, Account()))
    else:
        yield from read_shard(path, copy)


def read_keys(folder: Place | str | Sequence[str], info: ShardInfo) -> Iterator[str]:
    """The keys of a shard's utterances, in order, from the headers of its tar alone; `folder` and UserError as of `read_checked`.

    The shard is not compared with its index; one in a store is fetched whole.
    """
    path, foreign = info.at(folder), isinstance(info, ShardElsewhere) and info.reading is not None
    with _opened(path, None, foreign) as file:
        for name, _ in _members(path, file, foreign):
            _, stem, ending = parts_of(name)
            if stem and ending in EXTENSIONS:
                yield foreign_key(path, name) if foreign else stem


def read_checked(folder: Place | str | Sequence[str], info: ShardInfo) -> Iterator[Sample]:
    """The utterances of a shard, in order, once it was compared with what the index says; from a store it is fetched once.

    It raises UserError when it is missing, its size or SHA-256 differs, and as `read_shard`.

    Args:
        folder: what the index was read from.
    """
    path = info.at(folder)
    verb = "index" if isinstance(info, ShardElsewhere) and info.reading is not None else "prepare"
    remedy = f"fetch it again, or remove it and run `asr-kd {verb}` again"
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
        yield from read_listed(folder, info, copy)
