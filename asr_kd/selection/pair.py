"""Two sets of shards with recordings of the same moments → which belong together, and how far one is behind the other.

Targets that a teacher made of one recording then teach a student who hears the other: close-talk and far-field, clean and telephone, 16
and 8 kHz (Li et al. 2017, arXiv 1708.05466). Utterances are paired by key; what is heard in them decides.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from asr_kd.audio.decode import decode
from asr_kd.audio.offset import RATE, offset_of
from asr_kd.config.base import folders_of
from asr_kd.ending import stop_if_asked
from asr_kd.errors import AudioError, UserError
from asr_kd.files import place, write_whole
from asr_kd.progress import Progress
from asr_kd.selection.settings import PairSettings
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.keys import Seen, Shared
from asr_kd.shards.manifest import spilling
from asr_kd.shards.stream import map_ordered
from asr_kd.shards.tarset import Sample, read_checked, read_index, read_listed
from asr_kd.summary import tell_summary

#: digits of the values, of which both the list and the decisions are made
DIGITS = 3


class Task(NamedTuple):
    """A shard of the student's audio, the hash of its index, and in which shards the teacher heard the same keys."""

    shard: ShardInfo
    whole: str
    heard: list[tuple[ShardInfo, frozenset[str]]]


def pair(settings: PairSettings) -> None:
    """Write the list of pairs, whole or not at all; the same input gives the same bytes.

    Raises:
        UserError: when a set cannot be used, holds a key twice, or nothing is paired.
    """
    output, audio, heard = place(settings.output), read_index(settings.audio), read_index(settings.heard)
    if output.parent in map(place, [*folders_of(settings.audio), *folders_of(settings.heard)]):
        raise UserError(f"output: {output} would lie among what is read; name another file")
    for folder, shards in ((settings.audio, audio), (settings.heard, heard)):
        if not shards.samples:
            raise UserError(f"{folder}: holds no utterances; prepare audio shards with some")
    offsets: list[float] = []
    refused: Counter[str] = Counter()
    first = ""
    with spilling():
        tasks = _tasks(settings, audio, heard)
        matched = map_ordered(functools.partial(_matched, settings), tasks, settings.loader_workers)
        with write_whole(output, "w") as file, Progress("pair", audio.samples, "utterances") as progress:
            for lines in matched:
                for line in lines:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    refused.update(list(line.get("reasons", ())))
                    if line["kept"]:
                        offsets.append(line["offset_ms"])
                    elif not first:
                        first = f"{line['key']}: {'; '.join(line['reasons'].values())}"
                progress.advance(len(lines), sum(line["seconds"] for line in lines))
            if not offsets:
                raise UserError(
                    f"{settings.audio}: none of {audio.samples:,} utterances is paired with one of {settings.heard} (first: {first}); "
                    "check that both hold recordings of the same moments under the same keys"
                )
    tell_summary(
        output, utterances=audio.samples, done=len(offsets),
        figures={"offset_ms": [min(offsets), statistics.median(offsets), max(offsets)], "refused": dict(refused)},
    )  # fmt: skip
    said = f"behind by {min(offsets):g} to {max(offsets):g} ms (median {statistics.median(offsets):g})"
    reasons = f"; refused: {', '.join(f'{name} {count:,}' for name, count in refused.items())}" if refused else ""
    print(f"{settings.output}: {len(offsets):,} of {audio.samples:,} utterances are paired, {said}{reasons}")


def _tasks(settings: PairSettings, audio: ShardList, heard: ShardList) -> Iterator[Task]:
    """What is to be matched, shard by shard of the student's audio. Both sets may be cut into shards in any way."""
    theirs, ours, whole = Seen(), Seen(), audio.hash
    for number, info in enumerate(heard):
        _refuse(theirs.add(_keys(settings.heard, info), number), settings.heard, heard)
    for number, info in enumerate(audio):
        keys = _keys(settings.audio, info)
        _refuse(ours.add(keys, number), settings.audio, audio)
        wanted: defaultdict[int, set[str]] = defaultdict(set)
        for key in keys:
            if (there := theirs.find(key)) is not None:
                wanted[there].add(key)
        yield Task(info, whole, [(heard[there], frozenset(some)) for there, some in sorted(wanted.items())])


def _keys(folder: str | list[str], info: ShardInfo) -> list[str]:
    """Keys of a shard, which is not compared with its index yet."""
    return [sample.key for sample in read_listed(folder, info)]


def _refuse(shared: Shared | None, folder: str | list[str], shards: ShardList) -> None:
    if shared:
        raise UserError(f"{folder}: {shared.told(folder, shards)}; pairs need keys that differ")


def _matched(settings: PairSettings, task: Task) -> list[dict[str, Any]]:
    """The lines of a shard, in its order; each as `shards.chosen.Pairs` reads it."""
    ours = {sample.key: sample for sample in read_checked(settings.audio, task.shard)}
    found: dict[str, dict[str, Any]] = {}
    for info, keys in task.heard:
        for theirs in read_checked(settings.heard, info):
            stop_if_asked()
            if theirs.key in keys:
                where = {"heard": info.name, "heard_sha256": info.sha256}
                found[theirs.key] = {**where, **_compared(settings, theirs, ours[theirs.key])}
    lines = []
    for key, sample in ours.items():
        seconds = float(sample.fields.get("seconds", 0.0))
        more = found.get(key, {"reasons": {"counterpart": f"{settings.heard} has no such key"}})
        line = {
            "key": key,
            "kept": "reasons" not in more,
            "set": task.whole,
            "shard": task.shard.name,
            "seconds": seconds,
        }
        lines.append({**line, **more})
    return lines


def _compared(settings: PairSettings, theirs: Sample, ours: Sample) -> dict[str, Any]:
    """Values of a pair, and the reasons why it is refused, if there are any."""
    try:
        one, other = (
            decode(sample.audio, f"{folder}: {sample.key}", RATE, settings.max_seconds)[0]
            for folder, sample in ((settings.heard, theirs), (settings.audio, ours))
        )
    except AudioError as error:
        return {"reasons": {"audio": str(error)}}
    match = offset_of(one, other, RATE, settings.most_ms)
    offset, drift, correlation = (round(one, DIGITS) for one in (match.offset_ms, match.drift_ms, match.correlation))
    beyond = offset + (len(one) - len(other)) * 1000 / RATE
    reasons = {}
    if correlation < settings.correlation_at_least:  # then there is no offset to speak of
        reasons["correlation"] = f"{correlation:g} is below {settings.correlation_at_least:g}"
    else:
        if abs(drift) > settings.drift_ms_at_most:
            reasons["drift"] = f"the offset changes by {drift:g} ms, more than {settings.drift_ms_at_most:g}"
        if abs(beyond) > settings.most_ms:
            reasons["length"] = f"the ends lie {abs(beyond):.0f} ms apart, more than {settings.most_ms:g}"
    values = {"offset_ms": offset, "correlation": correlation, "drift_ms": drift}
    return {**values, "reasons": reasons} if reasons else values
