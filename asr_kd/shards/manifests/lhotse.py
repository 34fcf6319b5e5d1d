"""Lhotse's cuts, recordings and supervisions (JSON lines, packed or not), and Shar folders."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import Place, names_in
from asr_kd.shards.manifest import (
    LATEST,
    ROUNDING,
    Span,
    audio_place,
    database,
    json_object,
    shown,
    spilling,
    text_lines,
)
from asr_kd.shards.manifests.entries import AUDIO, Entry, Member, ending, root_of
from asr_kd.shards.manifests.tars import JSON, members

#: a file of cuts in a Shar folder
SHAR = re.compile(r"cuts\..+\.jsonl(\.gz)?")
#: transforms that change nothing that `sample_rate` would not
HARMLESS = ("Resample",)
_SAVE = "write the audio out with Lhotse, `cuts.save_audios`, and give those cuts"


class Sources:
    """Where the audio of recordings is; relative paths count from the manifest's folder (`root_of`)."""

    def __init__(self, folder: Place) -> None:
        self._folder = folder
        self._root: Place | None = None

    def find(self, recording: Any, where: str) -> Place:
        """The file of a recording, UserError where it is not one plain file."""
        if not isinstance(recording, dict):
            raise UserError(f"{where}: has no recording, so no audio; give cuts or supervisions with recordings")
        if not isinstance(recording.get("id"), str):
            raise UserError(f"{where}: the recording has no id that is text, but {shown(recording.get('id'))}; fix or remove it")  # fmt: skip
        here = f"{where}: the recording {recording['id']}"
        transforms = recording.get("transforms") or []
        harmless = isinstance(transforms, list) and all(
            isinstance(one, dict) and one.get("name") in HARMLESS for one in transforms
        )
        if not harmless:
            raise UserError(f"{here} is changed as it is read ({shown(transforms)}); {_SAVE}")
        sources = recording.get("sources")
        if not isinstance(sources, list) or not sources or not all(isinstance(one, dict) for one in sources):
            raise UserError(f"{here} has no `sources`, so no audio; fix or remove it")
        if len(sources) > 1:
            raise UserError(f"{here} is in several files; {_SAVE}")
        kind, path = sources[0].get("type"), sources[0].get("source")
        if kind not in ("file", "url"):
            raise UserError(f"{here} is no file but of the type {shown(kind)}; {_SAVE}")
        if not isinstance(path, str) or not path:
            raise UserError(f"{here}: `source` must be the path of a file, not {shown(path)}; fix or remove it")
        self._root = self._root or root_of(self._folder, path)
        return audio_place(self._root, path, here)


def cuts(path: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The cuts of a file; of one with several supervisions, each of them.

    It raises UserError, naming the line, where a cut is mixed or padded, or its recording is not one plain file.
    """
    sources = Sources(path.parent)
    for _, where, line in text_lines(path, "list of cuts"):
        cut = _cut(line, where)
        yield from _of_cut(cut, sources.find(cut.get("recording"), where), where)


def recordings(path: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The recordings of a file, whole and without text."""
    sources = Sources(path.parent)
    for _, where, line in text_lines(path, "list of recordings"):
        one = json_object(line, where)
        yield Entry(where, str(one.get("id")), sources.find(one, where), identity=str(one.get("id")))


def recordings_beside(path: Place) -> Place:
    """The file of the recordings of a file of supervisions."""
    return path.parent / path.name.replace("supervisions", "recordings")


def supervisions(path: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The supervisions of a file, with the audio of the recordings beside it, whose file has `recordings` in its name instead.

    The recordings are kept in a temporary database that spills to the disk.
    """
    of_audio = recordings_beside(path)
    if of_audio == path or not of_audio.exists():
        raise UserError(f"{path}: holds supervisions, and no {of_audio.name if of_audio != path else 'recordings'} lies beside it; give both, or cuts")  # fmt: skip
    sources = Sources(path.parent)
    with contextlib.closing(database("recordings (id TEXT PRIMARY KEY, value TEXT)")) as known, spilling():
        for _, where, line in text_lines(of_audio, "list of recordings"):
            one = json_object(line, where)
            try:
                known.execute("INSERT INTO recordings VALUES (?, ?)", (str(one.get("id")), json.dumps([one, where])))
            except sqlite3.IntegrityError:
                raise UserError(f"{where}: the recording {shown(one.get('id'))} was there before; remove one of them") from None  # fmt: skip
        for _, where, line in text_lines(path, "list of supervisions"):
            one = json_object(line, where)
            row = known.execute("SELECT value FROM recordings WHERE id = ?", (str(one.get("recording_id")),)).fetchone()
            if row is None:
                raise UserError(f"{where}: the recording {shown(one.get('recording_id'))} is not in {of_audio}; add it, or remove the line")  # fmt: skip
            recording, stands = json.loads(row[0])
            yield _spoken(one, sources.find(recording, stands), 0.0, _channels(recording), where)


def shar(folder: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The cuts of a Shar folder, with the sound that lies in `recording.*.tar` in the same order.

    It raises UserError when a cut and its sound do not stand in the same order, or a tar is missing or damaged.
    """
    for name in sorted(name for name in names_in(folder) if SHAR.fullmatch(name)):
        part = name.removesuffix(".gz").removesuffix(".jsonl").removeprefix("cuts.")
        tar = folder / f"recording.{part}.tar"
        if not tar.exists():
            raise UserError(
                f"{folder / name}: has no {tar.name} beside it; fetch it, or export with the field recording"
            )
        audio = (one for one in members(tar) if ending(one.name) != JSON)
        for line, sound in itertools.zip_longest(text_lines(folder / name, "list of cuts"), audio):
            if line is None:
                raise UserError(f"{tar}: {sound.name} has no line in {name}; export the folder again")
            _, where, text = line
            cut = _cut(text, where)
            if sound is None or sound.name.rpartition(".")[0] != cut["id"] or ending(sound.name) not in AUDIO:
                found = sound.name if sound else "its end"
                raise UserError(f"{where}: the sound of {cut['id']} is not there in {tar.name}, but {found}; export the folder again")  # fmt: skip
            yield from _of_cut(cut, Member("tar", sound.name, tar, sound.begin, sound.size), where)


def _cut(line: str, where: str) -> dict[str, Any]:
    cut = json_object(line, where)
    if "tracks" in cut or cut.get("type") not in (None, "MonoCut", "Cut"):
        raise UserError(f"{where}: is a {cut.get('type', 'MixedCut')}, which is mixed, padded or of several channels; {_SAVE}")  # fmt: skip
    if not isinstance(cut.get("id"), str):
        raise UserError(f"{where}: the cut has no id that is text; fix or remove it")
    return cut


def _of_cut(cut: dict[str, Any], audio: Any, where: str) -> Iterator[Entry]:
    start, length = _time(cut, "start", where), _time(cut, "duration", where)
    channels = _channels(cut["recording"])
    spoken = cut.get("supervisions") or []
    if not isinstance(spoken, list) or not all(isinstance(one, dict) for one in spoken):
        raise UserError(f"{where}: `supervisions` must be a list of objects, not {shown(spoken)}")
    if not spoken:
        fields = _fields(cut, channels)
        yield Entry(where, cut["id"], audio, None, fields, Span(start, start + length), cut["id"])
    for one in spoken:
        entry = _spoken(one, audio, start, channels, where)
        if len(spoken) == 1:
            entry.name = entry.identity = cut["id"]
            begin, end = entry.span.start, entry.span.end or 0.0
            if abs(begin - start) <= ROUNDING and abs(end - start - length) <= ROUNDING:
                entry.span = Span(start, start + length)
        yield entry


def _spoken(one: dict[str, Any], audio: Any, start: float, channels: int, where: str) -> Entry:
    """A supervision, whose times count from `start` on."""
    name, text = one.get("id"), one.get("text")
    if not isinstance(name, str) or not (text is None or isinstance(text, str)):
        raise UserError(f"{where}: a supervision must have an id and a text that are text, not {shown(name)} and {shown(text)}")  # fmt: skip
    begin = round(start + _time(one, "start", where), 9)  # 0.5 - 0.4 is not quite 0.1
    return Entry(where, name, audio, text, _fields(one, channels), Span(begin, round(begin + _time(one, "duration", where), 9)), name)  # fmt: skip


def _fields(one: dict[str, Any], channels: int) -> dict[str, Any]:
    """What else is known; the channel only where it is one of several."""
    names = ("speaker", "gender", "language", "custom", *(("channel",) if channels > 1 else ()))
    known = {name: one[name] for name in names if one.get(name) is not None}
    return known | ({"recording": one["recording_id"]} if isinstance(one.get("recording_id"), str) else {})


def _channels(recording: Any) -> int:
    sources = recording.get("sources") if isinstance(recording, dict) else None
    channels = sources[0].get("channels") if isinstance(sources, list) and sources else None
    return len(channels) if isinstance(channels, list) else 1


def _time(one: dict[str, Any], name: str, where: str) -> float:
    value = one.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LATEST:
        raise UserError(f"{where}: `{name}` must be a number of seconds, not {shown(value)}")
    return float(value)
