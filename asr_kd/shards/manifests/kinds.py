"""Which kind of manifest a file or folder is, by what it holds."""

from __future__ import annotations

import csv
import json
import zlib
from collections import Counter
from enum import Enum
from typing import Any

from asr_kd.audio import containers
from asr_kd.errors import UserError
from asr_kd.files import Place, names_in, readable
from asr_kd.objects import ObjectPath
from asr_kd.shards.manifest import GZIP, check_plain
from asr_kd.shards.manifests.entries import AUDIO, ending, files_below
from asr_kd.shards.manifests.folders import TRANSCRIPTS
from asr_kd.shards.manifests.kaldi import SCP, SEGMENTS, SPEAKERS, TEXT
from asr_kd.shards.manifests.lhotse import SHAR
from asr_kd.shards.manifests.tables import METADATA

#: bytes by which a file is recognised
HEAD = 1 << 20
#: endings of files in a folder that may be lists of utterances
_LISTS = ("jsonl", "json", "ndjson", "gz", "tsv", "csv", "parquet")
_KNOWN = "a Kaldi data folder, Lhotse's Shar, LibriSpeech, an audiofolder with metadata, Parquet, WebDataset tars or audio files"


class Kind(Enum):
    """Kinds of manifests, and how they are called."""

    LINES = "JSON lines"
    NEMO = "JSON lines of NeMo"
    CUTS = "cuts of Lhotse"
    RECORDINGS = "recordings of Lhotse, without text"
    SUPERVISIONS = "supervisions of Lhotse, with the recordings beside them"
    SHAR = "a Shar folder of Lhotse"
    KALDI = "a data folder of Kaldi"
    COMMON_VOICE = "a table of Common Voice"
    AUDIOFOLDER = "an audiofolder of Hugging Face"
    PARQUET = "Parquet with embedded audio"
    LIBRISPEECH = "a folder laid out as LibriSpeech"
    AUDIO = "a folder of audio files, without text"
    TARS = "WebDataset tars"


def recognise(path: Place) -> Kind:
    """The kind of a manifest; UserError when a folder is of none or of several, or holds manifests itself."""
    if path.is_dir():
        return _folder(path)
    if path.name in (SCP, SEGMENTS, TEXT, SPEAKERS) and (path.parent / SCP).exists():
        raise UserError(f"{path}: is a part of a data folder of Kaldi; give the folder, {path.parent}")
    return of_file(path) or Kind.LINES  # whose reader says what is wrong with anything else


def of_file(path: Place) -> Kind | None:
    """The kind of a file, by its first bytes; None if they are of no known kind. UserError when there is no such file."""
    check_plain(path, "manifest")
    with readable(path, "manifest"):
        if isinstance(path, ObjectPath):
            head = path.read_bytes(HEAD)
        else:
            with open(path, "rb") as file:
                head = file.read(HEAD)
    packed = head.startswith(GZIP)
    if packed:
        try:
            head = zlib.decompressobj(31).decompress(head, HEAD)
        except zlib.error:
            return None
    if head[257:262] == b"ustar":
        if packed:
            raise UserError(f"{path}: is a tar packed by gzip; unpack it first: gunzip < {path.name} > NEW.tar")
        return Kind.TARS
    if head.startswith(b"PAR1") and not packed:
        return Kind.PARQUET
    sound = None if packed else containers.recognise(head[: containers.HEAD])
    if sound and sound.what and sound.certain:
        raise UserError(f"{path}: is audio itself ({sound.what}); give the folder that it lies in, or a list that names it")  # fmt: skip
    line = next(filter(str.strip, head.decode("utf-8-sig", "replace").splitlines()), "").strip()
    return _of_object(line, path) if line.startswith("{") else _of_columns(line)


def _of_object(line: str, path: Place) -> Kind | None:
    """By the first object of JSON lines."""
    try:
        value: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if "audio" in value:
        return Kind.LINES
    if "audio_filepath" in value:
        if "shard_id" in value:
            raise UserError(f"{path}: lists members of NeMo's tarred data (shard_id); give the list of the audio files that the tars were made of")  # fmt: skip
        return Kind.NEMO
    if "tracks" in value or value.get("type") in ("MonoCut", "MultiCut", "MixedCut", "PaddingCut", "Cut") or isinstance(value.get("recording"), dict):  # fmt: skip
        return Kind.CUTS
    if isinstance(value.get("sources"), list):
        return Kind.RECORDINGS
    if {"recording_id", "start", "duration"} <= value.keys():
        return Kind.SUPERVISIONS
    return Kind.AUDIOFOLDER if "file_name" in value else None


def _of_columns(line: str) -> Kind | None:
    """By the first line of a table."""
    if {"path", "sentence"} <= set(line.split("\t")):
        return Kind.COMMON_VOICE
    return Kind.AUDIOFOLDER if "file_name" in next(csv.reader([line]), []) else None


def _folder(path: Place) -> Kind:
    here = sorted(names_in(path))
    if SCP in here:
        return Kind.KALDI
    if any(SHAR.fullmatch(name) for name in here):
        return Kind.SHAR
    found: Counter[str] = Counter()
    metadata: list[str] = []
    transcripts = False
    for name in files_below(path):
        found["audio" if ending(name) in AUDIO else ending(name)] += 1
        transcripts = transcripts or name.endswith(TRANSCRIPTS)
        if name.rpartition("/")[2] in METADATA:
            metadata.append(name)
    for name in metadata:
        if of_file(path / name) is not Kind.AUDIOFOLDER:
            raise UserError(f"{path / name}: names no `file_name`, as the metadata of an audiofolder do; write a list of JSON lines with audio and text")  # fmt: skip
    kinds = {"audio": Kind.AUDIO, "tar": Kind.TARS, "parquet": Kind.PARQUET}
    there = [kinds[what] for what in kinds if found[what]]
    if metadata and there == [Kind.AUDIO]:
        return Kind.AUDIOFOLDER
    lists = [name for name in here if ending(name) in _LISTS and (path / name).is_file() and of_file(path / name) not in (None, Kind.PARQUET)]  # fmt: skip
    if lists:
        raise UserError(f"{path}: holds lists of utterances itself ({', '.join(lists[:4])}{', …' if lists[4:] else ''}); give the one you mean")  # fmt: skip
    if len(there) > 1:
        raise UserError(f"{path}: holds {' and '.join(what for what in kinds if found[what])} files; put each kind into a folder of its own")  # fmt: skip
    if not there:
        here_alone = " right in it (in a store folders below are not seen)" if isinstance(path, ObjectPath) else ""
        raise UserError(f"{path}: holds nothing that is known{here_alone}; give a list of JSON lines, or {_KNOWN}")
    return Kind.LIBRISPEECH if transcripts and there == [Kind.AUDIO] else there[0]
