"""The index of shards that are there already: tars that others wrote, or several sets as one. Nothing is copied."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import (
    CLAIM,
    Place,
    claim_folder,
    claimed_settings,
    clear_errors,
    clear_torn,
    local_copy,
    names_in,
    place,
    read_json,
    read_text,
    sha256_file,
    write_json,
    write_whole,
)
from asr_kd.objects import ObjectPath
from asr_kd.progress import Progress
from asr_kd.shards.foreign import Account, Reading, foreign_samples
from asr_kd.shards.index import Origin, ShardList
from asr_kd.shards.index_file import ELSEWHERE, FORMAT, INDEX, KEYS_DIFFER, read_index, write_index
from asr_kd.shards.keys import Seen, Shared, shared_key
from asr_kd.shards.leases import sole_writer
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.settings import IndexSettings
from asr_kd.shards.stream import map_ordered
from asr_kd.shards.tarset import read_members
from asr_kd.summary import tell_summary

READERS = 16  # threads that look at records
RECORDS = ".records"  # beside the index: what was found in each tar
_TAR = re.compile(r"\.(tar|tar\.gz|tgz)$")
_SHAR = re.compile(r"cuts\..*jsonl(\.gz)?$")


def index(settings: IndexSettings) -> None:
    """Write the index of the tars in a folder, or of several sets that have one, into a folder of its own, and print the account.

    Every tar is read once. Killed at any moment and started again, it goes on with the tars that were not read yet, and ends in the
    same index; a tar that came since is added, one of another size is read again. What is no utterance is listed in `quarantine.jsonl`.

    Raises:
        UserError: when there are no such tars or sets, one cannot be read, the output belongs to others, or more than `max_bad_share`
            was quarantined; then no index is written.
    """
    if not isinstance(settings.audio, str):
        _join(settings, settings.audio)
        return
    began, audio, output = time.time(), place(settings.audio), place(settings.output)
    files = _tars(audio)
    if output == audio:
        raise UserError(f"output: {output} is where the tars are; name a folder of its own, which may lie in it")
    reading = _reading(settings)
    origin = Origin(named_from(output, settings.audio), reading)
    claim = {
        "folder": origin.folder,
        "text": settings.text,
        "classes": settings.classes and sha256_file(settings.classes),
    }
    claim_folder(output, "index", claim)
    bad, unread, texts = Quarantine(0, settings.max_bad_share), Counter[str](), Counter[str]()
    rows: list[dict[str, Any]] = []
    seen, shared = Seen(), None
    with sole_writer(output) as check:
        with (
            Progress("index", len(files), "tars") as progress,
            write_whole(output / "quarantine.jsonl", "w", make_folder=False) as listing,
        ):
            for record in _records(settings, audio, reading, files, progress):
                check()
                if settings.keys:
                    shared = shared or seen.add(record["keys"], len(rows))
                rows.append(record["shard"])
                for line in record["quarantined"]:
                    bad.add(line["key"], line["reason"])
                    listing.write(json.dumps({**line, "file": record["shard"]["file"]}, ensure_ascii=False) + "\n")
                unread.update(record["unread"])
                texts.update(record["texts"])
        for folder in (output, output / RECORDS):
            clear_torn(folder, began)
        shards = ShardList.parse(json.dumps(rows), Origin(settings.audio, reading)).named_apart()
        bad.total = shards.samples + bad.count
        said = [f"{count:,} texts from {source}" for source, count in sorted(texts.items()) if source]
        said += [f"{texts['']:,} utterances without text"] if texts[""] else []
        said += [f"not read: {count:,} {ending}" for ending, count in sorted(unread.items())]
        print(
            f"{output}: {bad.total:,} utterances in = {shards.samples:,} indexed + {bad.count:,} quarantined\n"
            f"{shards.seconds / 3600:.3f} audio hours in {len(shards):,} tars of {audio}\n{'; '.join(said)}"
        )
        tell_summary(
            output, utterances=bad.total, done=shards.samples, quarantined=bad.count, audio_hours=shards.seconds / 3600,
            figures={"shards": len(shards), "texts": dict(texts), "unread": dict(unread)},
        )  # fmt: skip
        if not bad.total:
            raise UserError(
                f"{audio}: its tars hold no utterances, only {', '.join(unread) or 'nothing'}; this wants WebDataset's <key>.flac beside <key>.json or <key>.txt"
            )
        if bad.too_many or not shards.samples:
            (output / INDEX).unlink(missing_ok=True)
        bad.refuse(settings.audio, f"see {output / 'quarantine.jsonl'}, and fix the tars")
        _refuse(shared, settings, shards)
        write_index(output, shards, origin, settings.keys)


def _refuse(shared: Shared | None, settings: IndexSettings, shards: ShardList) -> None:
    """Refuse a set for a key that two utterances have."""
    if shared:
        raise UserError(
            f"{settings.audio}: {shared.told(settings.audio, shards)}; make one of them again with other keys, or leave out keys=true, and take "
            "each set by itself where it gets transcripts"
        )


def _join(settings: IndexSettings, folders: Sequence[str]) -> None:
    output = place(settings.output)
    if output in map(place, folders):
        raise UserError(f"output: {output} is one of the sets; name a folder of its own")
    sets = [{"folder": named_from(output, folder), "hash": read_index(folder).hash} for folder in folders]
    shards = read_index(folders)  # the whole is checked before anything is written
    shared = shared_key(list(folders), shards, workers=settings.loader_workers) if settings.keys else None
    _refuse(shared, settings, shards)
    claim_folder(output, "index", {"sets": [one["folder"] for one in sets]})
    with sole_writer(output):
        noted = KEYS_DIFFER if settings.keys else {}
        write_json(output / INDEX, {"format": FORMAT, "version": ELSEWHERE, **noted, "sets": sets}, make_folder=False)
    tell_summary(
        output, utterances=shards.samples, done=shards.samples, quarantined=0, audio_hours=shards.seconds / 3600,
        figures={"shards": len(shards), "sets": len(folders)},
    )  # fmt: skip
    print(
        f"{output}: {len(folders)} sets, {len(shards):,} shards, {shards.samples:,} utterances, {shards.seconds / 3600:.3f} audio hours"
    )


def named_from(output: Place, folder: str) -> str:
    """How an index in `output` names a folder: as the user did, but a relative path as it is from there."""
    if isinstance(place(folder), ObjectPath) or os.path.isabs(folder):
        return folder
    real = os.path.realpath(folder)
    return real if isinstance(output, ObjectPath) else os.path.relpath(real, os.path.realpath(output))


def _tars(audio: Place) -> list[str]:
    """Names of the tars in a folder, in order; UserError when there are none, or it is a set of another kind."""
    if audio.is_file():
        raise UserError(f"{audio}: is a file; give the folder of the tars")
    names = sorted(names_in(audio))
    if not names:
        raise UserError(f"{audio}: no such folder, or it is empty; check the path")
    known = None
    if INDEX in names:
        with suppress(UserError):  # of another tool
            known = read_json(audio / INDEX)
    if isinstance(known, dict) and known.get("format") == FORMAT:
        raise UserError(f"{audio}: has an index already; use it as it is, or give a list of sets to join them")
    if any(map(_SHAR.match, names)):
        raise UserError(
            f"{audio}: is Lhotse Shar, whose texts lie beside its tars, in cuts.*.jsonl.gz; give it to `asr-kd prepare` as the manifest"
        )
    if CLAIM in names and claimed_settings(audio):
        raise UserError(
            f"{audio}: is made by a job of asr-kd ({CLAIM}); let that be finished, and use what it makes as it is"
        )
    tars = [name for name in names if _TAR.search(name) and not name.startswith(".")]
    if not tars:
        raise UserError(
            f"{audio}: holds no .tar itself; where they lie in folders below, index each of those, then join them: audio=[one, two]"
        )
    return tars


def _reading(settings: IndexSettings) -> Reading:
    if settings.classes is None:
        return Reading(settings.text)
    lines = read_text(settings.classes, "list of classes").removeprefix("\ufeff").splitlines()
    return Reading(settings.text, tuple(line.strip() for line in lines))


def _records(
    settings: IndexSettings, audio: Place, reading: Reading, files: list[str], progress: Progress
) -> Iterator[dict[str, Any]]:
    """What was found in each tar, in order."""
    folder = place(settings.output) / RECORDS
    with clear_errors(folder):
        folder.mkdir(exist_ok=True)
    known = set(names_in(folder))

    def record_of(file: str) -> dict[str, Any] | None:
        """What was found in a tar earlier, if it still has the size that it had then, and it is all that is wanted."""
        if f"{file}.json" not in known:
            return None
        value: dict[str, Any] = read_json(folder / f"{file}.json", "record of a tar")
        if settings.keys and "keys" not in value:
            return None
        return value if value["shard"]["bytes"] == (audio / file).stat().st_size else None

    with ThreadPoolExecutor(READERS) as pool:
        left = [file for file, record in zip(files, pool.map(record_of, files), strict=True) if record is None]
    progress.resume(len(files) - len(left))
    found = map_ordered(functools.partial(_examined, audio, reading, settings.keys), left, settings.loader_workers)
    new = set(left)
    for file in files:
        if file in new:
            value = next(found)
            write_json(folder / f"{file}.json", value, make_folder=False)
            progress.advance(1, value["shard"]["seconds"])
            yield value
        else:
            yield read_json(folder / f"{file}.json", "record of a tar")


def _examined(audio: Place, reading: Reading, with_keys: bool, file: str) -> dict[str, Any]:
    """Read a tar: what its index says of it, what was quarantined, what was not read, where its texts come from, and its keys."""
    path, account, seconds = audio / file, Account(), 0.0
    keys: list[str] = []
    with local_copy(path) as copy:
        for key, _, _, fields in foreign_samples(path, read_members(path, copy, foreign=True), reading, account):
            seconds += fields["seconds"]
            keys.append(key)
        size, sha256 = copy.stat().st_size, sha256_file(copy)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", _TAR.sub("", file))[:200] + ".tar"
    shard = {
        "name": name,
        "samples": len(keys),
        "seconds": round(seconds, 6),
        "bytes": size,
        "sha256": sha256,
        "file": file,
    }
    quarantined = [{"key": key, "reason": reason} for key, reason in account.bad]
    found = {"shard": shard, "quarantined": quarantined, "unread": account.unread, "texts": account.texts}
    return {**found, "keys": keys} if with_keys else found
