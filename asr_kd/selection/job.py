"""Audio shards, with what teachers say of them → a list of the utterances to learn from, each with its values and reasons.

Thresholds come first. Of what they leave the best are taken in order, by one ranking, while there is room in the whole and with their
speaker. Confidence and agreement filter self-training (Kahn et al. 2020, arXiv 1909.09116; Park et al. 2020, arXiv 2005.09629; without
labels Waheed et al. 2024, arXiv 2407.01257); whether that beats a random choice of the same size is to be measured.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from asr_kd.config.base import folders_of
from asr_kd.errors import UserError
from asr_kd.files import place, write_whole
from asr_kd.progress import Progress
from asr_kd.selection.evidence import Evidence, Witnesses
from asr_kd.selection.settings import SelectionSettings
from asr_kd.shards.chosen import Chosen
from asr_kd.shards.index import ShardList
from asr_kd.shards.keys import Seen
from asr_kd.shards.manifest import database, spilling
from asr_kd.shards.tarset import read_checked, read_index
from asr_kd.summary import tell_summary

#: what is known of an utterance while the job runs: a row of a temporary database, which spills to the disk
RECORD = (
    "utterances (number INTEGER PRIMARY KEY, key TEXT, shard TEXT, seconds REAL, speaker TEXT, confidence REAL, spoken INTEGER, "
    "pace REAL, disagreement REAL, counts TEXT, draw INTEGER)"
)
#: order of each ranking; what is not known comes last, and what is equal as it was drawn
ORDER = {
    "confidence": "confidence IS NULL, confidence DESC, draw",
    "disagreement": "disagreement IS NULL, disagreement, draw",
    "random": "draw",
}
#: digits of the values, of which both the list and the decisions are made
DIGITS = 6


def select(settings: SelectionSettings) -> None:
    """Write the list of a set's utterances, whole or not at all; the same input gives the same bytes.

    Raises:
        UserError: when the audio, the targets or the transcripts cannot be used, an utterance lacks what is asked for, or
            nothing is kept.
    """
    output, shards = place(settings.output), read_index(settings.audio)
    inputs = [place(one) for one in (settings.transcripts, settings.against, settings.like) if one]
    folders = [place(one) for one in (*folders_of(settings.audio), settings.targets) if one]
    if output in inputs or output.parent in folders:
        raise UserError(f"output: {output} would lie among what is read; name another file")
    if not shards.samples:
        raise UserError(f"{settings.audio}: holds no utterances; prepare audio shards with some")
    records = database(RECORD)
    records.row_factory = sqlite3.Row
    with spilling():
        with Progress("select", shards.samples, "utterances") as progress:
            records.executemany(
                f"INSERT INTO utterances VALUES ({', '.join('?' * 11)})", _measured(settings, shards, progress)
            )
        records.execute("CREATE TEMP TABLE reasons (number INTEGER PRIMARY KEY, text TEXT)")
        unknown = _unknown(settings, records)
        _judge(settings, records)
        if settings.limits:
            _limit(settings, records)
        summary = _summary(settings, records)
        if unknown:
            summary += f"; {settings.by} is not known of {unknown:,}, which come last"
        with write_whole(output, "w") as file:
            for row in records.execute("SELECT * FROM utterances LEFT JOIN reasons USING (number) ORDER BY number"):
                file.write(json.dumps(_line(row, shards.hash), ensure_ascii=False) + "\n")
    print(f"{settings.output}: {summary}")


def _measured(settings: SelectionSettings, shards: ShardList, progress: Progress) -> Iterator[tuple[Any, ...]]:
    """A record of each utterance, shard by shard."""
    witnesses, number, seen = Witnesses(settings), 0, Seen()
    timed = settings.limits or settings.paced
    for turn, info in enumerate(shards):
        of_targets = witnesses.of_shard(info)
        for sample in read_checked(settings.audio, info):
            if shared := seen.add([sample.key], turn):
                raise UserError(
                    f"{settings.audio}: {shared.told(settings.audio, shards)}; a list needs keys that differ"
                )
            where, seconds = f"{info.at(settings.audio)}: {sample.key}", float(sample.fields.get("seconds", 0.0))
            if timed and seconds <= 0:
                raise UserError(
                    f"{where} has no `seconds`, by which the choice is measured; prepare the audio shards again"
                )
            speaker = sample.fields.get("speaker")
            if speaker is None and (settings.speaker_hours or settings.speaker_utterances):
                raise UserError(f"{where} has no `speaker`, of whom only so much may be kept; leave out speaker limits")
            one = witnesses.add_texts(sample.key, of_targets.get(sample.key, Evidence()))
            pace = None if one.spoken is None or not seconds else one.spoken / seconds
            counts = json.dumps(sorted(one.counts.items())) if settings.by == "variety" else ""
            draw = int.from_bytes(hashlib.sha256(f"{settings.seed} {sample.key}".encode()).digest()[:7])
            yield (
                number, sample.key, info.name, seconds, None if speaker is None else str(speaker), _rounded(one.confidence), one.spoken,
                _rounded(pace), _rounded(one.disagreement), counts, draw,
            )  # fmt: skip
            number += 1
        progress.advance(info.samples, info.seconds)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _unknown(settings: SelectionSettings, records: sqlite3.Connection) -> int:
    """Number of utterances of which the ranking knows nothing; a UserError when it is all of them."""
    if not settings.limits or settings.by == "random":
        return 0
    column = "counts = '[]'" if settings.by == "variety" else f"{settings.by} IS NULL"
    count, every = records.execute(f"SELECT TOTAL({column}), COUNT(*) FROM utterances").fetchone()
    if count == every:
        raise UserError(
            f"by: nothing is known of the {settings.by} of any utterance of {settings.audio}; give targets or transcripts of this audio"
        )
    return int(count)


def _judge(settings: SelectionSettings, records: sqlite3.Connection) -> None:
    """Note the utterances that fail a threshold, with all reasons."""
    unit = _median_pace(records) if settings.pace_of_median and settings.paced else 1.0
    asked = [
        ("confidence", "confidence", settings.confidence_at_least, math.inf),
        ("disagreement", "disagreement", 0.0, settings.disagreement_at_most if settings.disagreement_at_most < 1 else math.inf),
        ("pace", "pace", settings.pace_at_least * unit, math.inf if settings.pace_at_most is None else settings.pace_at_most * unit),
    ]  # fmt: skip
    asked = [one for one in asked if one[2] > 0 or one[3] < math.inf]
    for row in records.execute("SELECT * FROM utterances") if asked else ():
        reasons = {}
        for name, column, least, most in asked:
            value = row[column]
            if value is None:
                reasons[name] = "not known: no target or text"
            elif value < least:
                reasons[name] = f"{value:g} is below {least:g}"
            elif value > most:
                reasons[name] = f"{value:g} is above {most:g}"
        if reasons:
            records.execute("INSERT INTO reasons VALUES (?, ?)", (row["number"], json.dumps(reasons)))


def _median_pace(records: sqlite3.Connection) -> float:
    """The lower median of the known paces above 0: what says nothing is no measure of how fast the others speak."""
    count = records.execute("SELECT COUNT(*) FROM utterances WHERE pace > 0").fetchone()[0]
    if not count:
        raise UserError("pace: nothing is said in any utterance; check targets and transcripts")
    middle = "SELECT pace FROM utterances WHERE pace > 0 ORDER BY pace LIMIT 1 OFFSET ?"
    return float(records.execute(middle, ((count - 1) // 2,)).fetchone()[0])


def _limit(settings: SelectionSettings, records: sqlite3.Connection) -> None:
    """Take what is left in the order of the ranking, while there is room; note the others."""
    total = records.execute("SELECT SUM(seconds) FROM utterances").fetchone()[0]
    name, room = "share", settings.share * total if settings.share < 1 else math.inf
    if settings.hours:
        name, room = "hours", settings.hours * 3600
    if settings.like:
        name, room = "like", Chosen(settings.like, settings.audio).shards.seconds
    most = settings.speaker_hours * 3600 if settings.speaker_hours else math.inf
    many = settings.speaker_utterances or math.inf
    of_speakers = most < math.inf or many < math.inf
    taken, full, of_speaker, spoken = 0.0, False, defaultdict[str, float](float), Counter[str]()
    for row in _ranked(settings, records):
        speaker, reasons = row["speaker"], {}
        # rounded: sums of the same lengths in another order are as long
        full = full or round(taken + row["seconds"] - room, DIGITS) > 0
        if full:
            reasons[name] = f"{room / 3600:.4g} hours come before it by {settings.by}"
        elif of_speakers and (
            spoken[speaker] >= many or round(of_speaker[speaker] + row["seconds"] - most, DIGITS) > 0
        ):
            heard = f"{spoken[speaker]:,} utterances and {of_speaker[speaker] / 3600:.4g} hours"
            reasons["speaker"] = f"{heard} of {speaker} come before it by {settings.by}"
        if reasons:
            records.execute("INSERT INTO reasons VALUES (?, ?)", (row["number"], json.dumps(reasons)))
            continue
        taken += row["seconds"]
        if of_speakers:
            of_speaker[speaker] += row["seconds"]
            spoken[speaker] += 1


def _ranked(settings: SelectionSettings, records: sqlite3.Connection) -> Iterator[sqlite3.Row]:
    """The utterances without a reason against them, the best first."""
    left = "SELECT * FROM utterances WHERE number NOT IN (SELECT number FROM reasons)"
    if settings.by != "variety":
        yield from records.execute(f"{left} ORDER BY {ORDER[settings.by]}")
        return
    # Σ over units of √(how often it is heard), grown most for its seconds, greedily (feature-based submodular selection, Wei et al., ICASSP
    # 2014). What an utterance adds only falls as others are taken: a gain that is still the largest when it is counted anew is the best.
    heard: Counter[str] = Counter()
    heap = [(-math.inf, row["draw"], row["number"]) for row in records.execute(left)]
    heapq.heapify(heap)
    while heap:
        _, draw, number = heapq.heappop(heap)
        row = records.execute("SELECT * FROM utterances WHERE number = ?", (number,)).fetchone()
        counts = json.loads(row["counts"])
        gain = sum(math.sqrt(heard[unit] + count) - math.sqrt(heard[unit]) for unit, count in counts) / row["seconds"]
        if heap and (-gain, draw, number) > heap[0]:
            heapq.heappush(heap, (-gain, draw, number))
            continue
        yield row
        if not records.execute("SELECT 1 FROM reasons WHERE number = ?", (number,)).fetchone():  # it was taken
            heard.update(dict(counts))


def _summary(settings: SelectionSettings, records: sqlite3.Connection) -> str:
    """What was kept, and what was left out by each reason."""
    joined = "FROM utterances LEFT JOIN reasons USING (number)"
    count, seconds = records.execute("SELECT COUNT(*), SUM(seconds) FROM utterances").fetchone()
    kept, of_kept = records.execute(f"SELECT COUNT(*), SUM(seconds) {joined} WHERE text IS NULL").fetchone()
    left: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for row in records.execute(f"SELECT seconds, text {joined} WHERE text IS NOT NULL ORDER BY number"):
        for name in json.loads(row["text"]):
            left[name][0] += 1
            left[name][1] += row["seconds"]
    said = [f"{name} {number:,} ({length / 3600:.2f} hours)" for name, (number, length) in left.items()]
    if not kept:
        raise UserError(f"{settings.audio}: none of {count:,} utterances would be kept, by {', '.join(said)}; ask less")
    tell_summary(
        settings.output, utterances=count, done=kept, audio_hours=of_kept / 3600,
        figures={"hours_before": seconds / 3600, "left_out": {name: number for name, (number, _) in left.items()}},
    )  # fmt: skip
    line = f"{kept:,} of {count:,} utterances are kept, {of_kept / 3600:.2f} of {seconds / 3600:.2f} hours"
    return f"{line}; left out: {', '.join(said)}" if said else line


def _line(row: sqlite3.Row, whole: str) -> dict[str, Any]:
    """A line of the list, as `shards.chosen` reads it."""
    line = {
        "key": row["key"],
        "kept": row["text"] is None,
        "set": whole,
        "shard": row["shard"],
        "seconds": row["seconds"],
    }
    line |= {name: row[name] for name in ("speaker", "confidence", "pace", "disagreement") if row[name] is not None}
    return line if row["text"] is None else {**line, "reasons": json.loads(row["text"])}
