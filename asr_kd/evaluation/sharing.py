"""Scoring all shards, shared by any number of processes without a coordinator: whatever a part is not there for is scored."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from asr_kd.decoding.settings import DecodingSettings
from asr_kd.evaluation.parts import Costs, Shard, is_there, read_costs, write_part
from asr_kd.evaluation.score import System, score
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.files import Place, check_there, clear_errors, clear_torn, hash_json, names_in, sha256_file
from asr_kd.progress import Progress
from asr_kd.shards.leases import Leases
from asr_kd.shards.quarantine import Quarantine
from asr_kd.text import NORMALIZERS

#: settings that decide the scores of a shard, beside its audio and the checkpoints
DECIDING = {
    *DecodingSettings.model_fields, "teacher", "normalizer", "batch_frames", "max_seconds", "precision", "device", "threads",
}  # fmt: skip
READERS = 16  # parts that are looked at at a time


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
    """Score every shard into a part; the costs of each system over all parts, when all is done, by whomever.

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
        progress.resume(total - _samples(left))

        def done(shard: Shard) -> bool:
            if there := work.is_done(shard):  # and was not when this process last looked: others did it
                progress.advance(shard.info.samples)
            return there

        def not_done(some: list[Shard]) -> list[Shard]:
            left = work.missing(some)
            progress.advance(total - _samples(left) - progress.done)  # done by others in the meantime
            return left

        bad, lease = Quarantine(total, work.settings.max_bad_share), "{0.set}.{0.info.name}".format
        leases.share(left, lease, done, not_done, lambda free: _score(work, free, bad, progress))
    for folder in (work.output, work.output / "parts", *folders):
        clear_torn(folder, began)
    sums = {system.name: Costs() for system in work.systems}
    for shard in work.shards:
        took = read_costs(shard.part(work.output))
        sums = {name: costs + took[name] for name, costs in sums.items()}
    return sums


def _score(work: Work, free: Iterator[Shard], bad: Quarantine, progress: Progress) -> Iterator[Shard]:
    """Score shards, and publish the part of each."""
    for shard, part, costs in score(work.settings, work.systems, free):
        write_part(shard.part(work.output), work.made_of(shard), part, costs)
        yield shard
        progress.advance(shard.info.samples, shard.info.seconds)
        for key, reason in part.quarantined.items():
            bad.add(key, reason)
        if bad.too_many:  # no need to wait for the end when it is lost already
            bad.refuse(str(shard.folder))


def _samples(shards: list[Shard]) -> int:
    return sum(shard.info.samples for shard in shards)
