"""Scoring all shards, shared by any number of processes without a coordinator: whatever a part is not there for is scored."""

from __future__ import annotations

import functools
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from asr_kd.decoding.settings import DecodingSettings
from asr_kd.errors import UserError
from asr_kd.evaluation.parts import Costs, Shard, is_there, read_costs, write_part
from asr_kd.evaluation.score import System, score
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.files import (
    Place,
    check_there,
    clear_errors,
    clear_torn,
    hash_json,
    names_in,
    sha256_file,
)
from asr_kd.progress import Progress
from asr_kd.shards.leases import Leases
from asr_kd.text import NORMALIZERS

#: settings that decide the scores of a shard, beside its audio and the checkpoints
DECIDING = {*DecodingSettings.model_fields, "teacher", "normalizer", "batch_frames", "max_seconds", "device", "threads"}
#: seconds between looks at shards that other processes are working on
WAIT = 0.5
#: parts that are looked at at a time
READERS = 16


@dataclass
class Work:
    """What is to be scored, and where the parts go."""

    settings: EvalSettings
    systems: list[System]
    shards: list[Shard]
    output: Place

    @functools.cached_property
    def _decided(self) -> str:
        """Hash of everything that decides a part but its audio."""
        systems = [[system.name, system.checkpoint.fingerprint] for system in self.systems]
        files = [path and sha256_file(path) for path in (self.settings.lm, self.settings.lexicon)]
        normalizer = NORMALIZERS[self.settings.normalizer].name
        return hash_json([self.settings.model_dump(include=DECIDING), normalizer, systems, files])

    def made_of(self, shard: Shard) -> str:
        """Hash of everything that decides a shard's part."""
        return hash_json([self._decided, shard.set, shard.info.sha256])

    def is_done(self, shard: Shard) -> bool:
        """Whether the shard's part is there, made with these checkpoints and settings of this audio."""
        return is_there(shard.part(self.output), self.made_of(shard))

    def missing(self, shards: list[Shard]) -> list[Shard]:
        """Those of the shards that are not done."""
        names = {name: set(names_in(self.output / "parts" / name)) for name in self.settings.sets}
        there = [shard for shard in shards if shard.part(self.output).name in names[shard.set]]
        with ThreadPoolExecutor(READERS) as pool:
            done = {shard for shard, is_done in zip(there, pool.map(self.is_done, there), strict=True) if is_done}
        return [shard for shard in shards if shard not in done]


def score_all(work: Work) -> dict[str, Costs]:
    """Score every shard into a part; returns when all is done, by whomever.

    Returns:
        costs of each system, over all parts.

    Raises:
        UserError: as `score`, and as soon as more than `max_bad_share` of all utterances was quarantined here.
    """
    began = time.time()
    folders = [work.output / "parts" / name for name in work.settings.sets]
    for folder in (work.output / "parts", *folders):
        check_there(work.output)
        with clear_errors(folder / "any"):
            folder.mkdir(exist_ok=True)
    total = sum(shard.info.samples for shard in work.shards)
    with Progress("eval", total, "utterances") as progress, Leases(work.output / ".leases") as leases:
        left = work.missing(work.shards)
        progress.resume(total - sum(shard.info.samples for shard in left))
        while left:
            scored = _score_free(work, leases, left, total, progress)
            left = work.missing(left)
            progress.advance(
                total - sum(shard.info.samples for shard in left) - progress.done
            )  # what others did meanwhile
            if left and not scored:  # what was looked at is in the hands of others
                time.sleep(WAIT)
            first = random.randrange(len(left)) if left else 0  # not where all the others are
            left = left[first:] + left[:first]
        leases.clear()
    for folder in (work.output, work.output / "parts", *folders):
        clear_torn(folder, began)
    return _costs(work)


def _score_free(work: Work, leases: Leases, left: list[Shard], total: int, progress: Progress) -> int:
    """Score those of the shards that nobody else is at work on; returns how many."""
    bad = scored = 0

    def is_done(shard: Shard) -> bool:
        done = work.is_done(shard)
        if done:  # and was not when this process last looked: others did it
            progress.advance(shard.info.samples)
        return done

    for shard, part, costs in score(work.settings, work.systems, leases.free(left, _lease, is_done)):
        write_part(shard.part(work.output), work.made_of(shard), part, costs)
        leases.give_back(_lease(shard))
        progress.advance(shard.info.samples, shard.info.seconds)
        bad += len(part.quarantined)
        if part.quarantined:  # no need to wait for the end when it is lost already
            refuse_bad(work.settings, bad, total, shard, next(iter(part.quarantined.items())))
        scored += 1
    return scored


def _lease(shard: Shard) -> str:
    return f"{shard.set}.{shard.info.name}"


def refuse_bad(settings: EvalSettings, bad: int, total: int, shard: Shard, example: tuple[str, str]) -> None:
    """Raise UserError when more than `max_bad_share` of all utterances is quarantined; `example`, of `shard`, is a key and its reason."""
    if bad > settings.max_bad_share * total:
        raise UserError(
            f"{shard.folder}: {bad} of {total} utterances could not be used (first: {shard.info.name}, {example[0]}: "
            f"{example[1]}); fix them or raise max_bad_share"
        )


def _costs(work: Work) -> dict[str, Costs]:
    """The costs of every part, added up."""
    sums = {system.name: Costs() for system in work.systems}
    for shard in work.shards:
        part = read_costs(shard.part(work.output))
        sums = {name: costs + part[name] for name, costs in sums.items()}
    return sums
