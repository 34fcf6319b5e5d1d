"""What became of every range of a manifest, and at the end of all: records, the list of what was quarantined, the index."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import Place, clear_errors, names_in, place, read_json, write_json, write_whole
from asr_kd.shards.cutting import Account
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.leases import ENDING, Leases
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.ranges import Plan
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import INDEX, read_index, shard_name, shard_stem, write_index
from asr_kd.summary import tell_summary

#: beside the shards: what was left out; what became of each range of utterances, and there, of all
QUARANTINE, RECORDS, OUTCOME = "quarantine.jsonl", ".records", "outcome.json"
#: threads that read the records
READERS = 16
#: fewer shards than this are looked up one by one, more by listing the folder
FEW = 16


@dataclass
class Outcome:
    """What became of the utterances of a manifest.

    Attributes:
        total: utterances of the manifest.
        written, seconds, shards: what the set holds.
        quarantined: how many were left out; `first`: key and reason of the first of them.
        excused: how many of these hold no speech, which fails no job.
        segments: what became of recordings that were cut, as `Account` has it.
    """

    total: int
    written: int = 0
    seconds: float = 0.0
    shards: int = 0
    quarantined: int = 0
    first: tuple[str, str] = ("", "")
    excused: int = 0
    segments: dict[str, Any] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        """Count a range."""
        for line in record["quarantined"]:
            if line.get("piece"):  # of a recording of which others are written
                continue
            silent = line.get("silent", False)
            if not self.quarantined or (self.quarantined == self.excused and not silent):
                self.first = line["key"], line["reason"]
            self.quarantined += 1
            self.excused += silent
        if "segments" in record:
            account = Account(**self.segments)
            account.add(Account(**record["segments"]))
            self.segments = dataclasses.asdict(account)
        if record["shard"]:
            self.written += record["shard"]["samples"]
            self.seconds += record["shard"]["seconds"]
            self.shards += 1

    def tell(self, settings: PrepareSettings) -> None:
        """Print it, and tell it for the summary; a UserError, and no index, when too many are bad, none is good, or the records are not of all of them."""
        output = place(settings.output)
        used = self.total - self.quarantined if settings.segment else self.written
        cut = {"utterances_written": self.written, "without_speech": self.excused, **self.segments}
        tell_summary(
            output, utterances=self.total, done=used, quarantined=self.quarantined, audio_hours=self.seconds / 3600,
            figures={"shards": self.shards, **(cut if settings.segment else {})},
        )  # fmt: skip
        if settings.segment:
            silent = f" ({self.excused:,} of them without speech)" if self.excused else ""
            print(f"{output}: {self.total:,} lines in = {used:,} used + {self.quarantined:,} quarantined{silent}")
            print(f"{self.written:,} utterances written; {Account(**self.segments)}")
        else:
            print(
                f"{output}: {self.total:,} utterances in = {self.written:,} written + {self.quarantined:,} quarantined"
            )
            if self.written + self.quarantined != self.total:
                raise UserError(
                    f"{output / RECORDS}: the records are not of all {self.total:,} utterances; remove {output}, and run the command again"
                )
        print(f"{self.seconds / 3600:.3f} audio hours in {self.shards:,} shards")
        bad = Quarantine(
            self.total, settings.max_bad_share, count=self.quarantined, first=self.first, excused=self.excused
        )
        if bad.too_many or not self.written:
            remove_index(output)
        bad.refuse(settings.manifest, f"see {output / QUARANTINE}, fix the audio and remove {output}")


def finished(output: Place) -> Outcome | None:
    """What an output holds that is whole, without a look at its records; None while work is left."""
    if not _is_published(output):
        return None
    with contextlib.suppress(UserError, TypeError):  # damaged since: made again
        infos, outcome = read_index(output), Outcome(**read_json(output / RECORDS / OUTCOME))
        return outcome if _all_there(output, infos) else None
    return None


def _is_published(output: Place) -> bool:
    return all(path.is_file() for path in (output / INDEX, output / QUARANTINE, output / RECORDS / OUTCOME))


def remove_index(output: Place) -> None:
    """Before a shard is made: it comes last, and a set that has one is whole."""
    with clear_errors(output / INDEX):
        (output / INDEX).unlink(missing_ok=True)


def publish(settings: PrepareSettings, plan: Plan) -> None:
    """List what was quarantined, print the account, and write the index; of several processes one does, and the others wait.

    It raises UserError as `Outcome.tell`.
    """
    output = place(settings.output)

    def infos() -> Iterator[ShardInfo]:
        outcome = Outcome(plan.total)
        with write_whole(output / QUARANTINE, "w", make_folder=False) as listing:
            for record in _records(output, plan):
                outcome.add(record)
                listing.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in record["quarantined"])
                if record["shard"]:
                    yield ShardInfo(**record["shard"])
        write_json(output / RECORDS / OUTCOME, dataclasses.asdict(outcome), make_folder=False)
        outcome.tell(settings)

    mine = False

    def work(free: Iterator[str]) -> Iterator[str]:
        nonlocal mine
        for name in free:
            write_index(output, infos())
            mine = True
            yield name

    while not mine:
        with Leases(output / ENDING) as leases:
            left = lambda some: [] if _is_published(output) else some  # noqa: E731
            leases.share(left([INDEX]), str, lambda _: _is_published(output), left, work)
        if not mine and (outcome := finished(output)):
            return outcome.tell(settings)
        if not mine:  # damaged, or removed meanwhile
            remove_index(output)
    return None


def _records(output: Place, plan: Plan) -> Iterator[dict[str, Any]]:
    """What became of each range, in order."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(plan.ranges), 64 * READERS):  # in batches: each waiting request takes memory
            some = plan.ranges[start : start + 64 * READERS]
            yield from pool.map(lambda number: read_record(record_of(output, number)), some)


def record_of(output: Place, number: int) -> Place:
    """The file that tells what became of a range."""
    return output / RECORDS / f"{shard_stem(number)}.json"


def read_record(path: Place) -> dict[str, Any]:
    """What became of a range: its shard (`ShardInfo`, or None), and what was quarantined; UserError when it is no such record."""
    value = read_json(path, "record of a shard")
    try:
        ShardInfo(**(value["shard"] or {"name": "", "samples": 0, "seconds": 0.0, "bytes": 0, "sha256": ""}))
        assert all({"key", "reason"} <= line.keys() for line in value["quarantined"])
    except (AssertionError, AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: is no record of a shard; remove it, and run the command again") from None
    return value


def is_done(output: Place, number: int) -> bool:
    """Whether a range is made: its record is there, and the shard that it tells of."""
    if not (path := record_of(output, number)).exists():
        return False
    shard = read_record(path)["shard"]
    return shard is None or _is_whole(output, ShardInfo(**shard))


def _is_whole(output: Place, info: ShardInfo) -> bool:
    path = output / info.name
    return path.is_file() and path.stat().st_size == info.bytes


def _all_there(output: Place, infos: ShardList) -> bool:
    if len(infos) < FEW:
        return all(_is_whole(output, info) for info in infos)
    names = set(names_in(output))
    return all(name in names for name in infos.names)


def missing(output: Place, numbers: Sequence[int]) -> list[int]:
    """Those of the ranges that are not made."""
    if len(numbers) < FEW:
        return [number for number in numbers if not is_done(output, number)]
    records, names = set(names_in(output / RECORDS)), set(names_in(output))
    return [
        number for number in numbers
        if record_of(output, number).name not in records  # a shard that is not there may be of bad utterances alone
        or (shard_name(number) not in names and not is_done(output, number))
    ]  # fmt: skip
