"""One lane of one source of a phase: shards → examples → batches, from any place on, in an order that the seed alone decides.

A pass reads the shards of the lane in random order. Examples are held until there are `bucket_utterances` of them, or the pass
ends: a block. Its batches, of like length, come in random order. Every draw is of the pass or of the block, so that to go on
in the middle, no more than the shards of one block are read again.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from asr_kd.audio.noise import check_noise_files
from asr_kd.distillation.batch import Example
from asr_kd.errors import UserError
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.manifest import Transcripts
from asr_kd.shards.stream import Item, LoadedShard, ShardInput, bucketed, load_features, map_ordered
from asr_kd.shards.tarset import INDEX, read_index
from asr_kd.training.settings import ChunkSettings, TrainSettings
from asr_kd.training.teachers import ShardTargets
from asr_kd.units import Units


@dataclass
class Cursor:
    """Where a lane of a source stands: the start of a block, and how many of the block's batches are given out.

    Attributes:
        number: passes that are over; shard, item: the block's first utterance is this item of this shard of the pass, or the
            one behind its end; block: blocks of this pass before this one; batch: batches of this block given out.
        seconds: of audio given out, in all passes.
        seen, unused, incomplete: utterances before this block, those that could not be used, and those without the target of
            every teacher.
    """

    number: int = 0
    shard: int = 0
    item: int = 0
    block: int = 0
    batch: int = 0
    seconds: float = 0.0
    seen: int = 0
    unused: int = 0
    incomplete: int = 0


@dataclass
class Reading:
    """An utterance as it was read: its place (pass, shard of the pass, item of the shard) and what there is to learn from it.

    Attributes:
        unused: why there is nothing; incomplete: which teachers' targets it lacks.
    """

    number: int
    shard: int
    item: int
    examples: list[Example]
    unused: str = ""
    incomplete: str = ""


@dataclass
class Source:
    """A source of a phase, opened once for all its lanes.

    Args:
        phase, index: its place in the settings.
        units: of the learner; soft targets over other units are refused.

    Attributes:
        first_unused, first_incomplete: (key, reason) of the first such utterance that this process met.
        ends: of lanes that have come to their end, the cursor there.
    """

    settings: TrainSettings
    phase: int
    index: int
    units: Units
    first_unused: tuple[str, str] = field(default=("", ""), init=False)
    first_incomplete: tuple[str, str] = field(default=("", ""), init=False)
    ends: dict[int, Cursor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.plan = self.settings.phases[self.phase].sources[self.index]
        self.needs = self.plan.needs
        self.chunks = self.settings.phases[self.phase].chunks
        self.shards = read_index(self.plan.audio).filled
        self.transcripts = Transcripts(self.plan.transcripts) if self.plan.transcripts else None
        self.seconds = self.shards.seconds * self.plan.repeat
        self.utterances = self.shards.samples * self.plan.repeat
        if self.plan.augment.noise and self.plan.augment.noise.folder:
            check_noise_files(self.plan.augment.noise.folder)
        if not self.utterances:
            raise UserError(f"{self.plan.audio}: holds no utterances; prepare the audio shards again")
        phase = self.settings.phases[self.phase]
        steered = phase.hours is None or (self.plan.weight is None and len(phase.sources) > 1)
        if steered and (silent := self.shards.without_seconds):
            raise UserError(
                f"{self.plan.audio}: {INDEX} says nothing of the length of {silent}, by which learning rate and mixture are steered; "
                "prepare the audio shards again, or write `seconds` into their JSON and index them anew"
            )

    def batches(self, lane: int, start: Cursor, passes: int | None) -> Iterator[tuple[list[Example], Cursor]]:
        """Batches of a lane from `start` on, each with the cursor behind it; without `passes` they never end.

        Raises:
            UserError: when targets, units or frame period do not fit, or more utterances than `max_bad_share` cannot be used.
        """
        cursor = start
        for block in self._blocks(lane, start, passes):
            if block[0].number != cursor.number:
                self._refuse_bad(cursor, endless=passes is None)
                cursor = replace(cursor, number=block[0].number, shard=0, item=0, block=0)
            rng = self._rng(cursor.number, 2, lane, cursor.block)
            held = [example for reading in block for example in reading.examples]
            frames = self.plan.batch_frames or self.settings.batch_frames
            for number, batch in enumerate(bucketed(held, lambda one: len(one.features), frames, rng), 1):
                if number > cursor.batch:
                    seconds = sum(one.frames for one in batch) * self.settings.features.frame_ms / 1000
                    cursor = replace(cursor, batch=number, seconds=cursor.seconds + seconds)
                    yield batch, cursor
            cursor = replace(
                cursor,
                shard=block[-1].shard,
                item=block[-1].item + 1,
                block=cursor.block + 1,
                batch=0,
                seen=cursor.seen + len(block),
                unused=cursor.unused + sum(bool(reading.unused) for reading in block),
                incomplete=cursor.incomplete + sum(bool(reading.incomplete) for reading in block),
            )
        self._refuse_bad(cursor)
        self.ends[lane] = cursor

    def _refuse_bad(self, cursor: Cursor, endless: bool = False) -> None:
        """Refuse what the other lanes cannot make good, and a lane that would be read again and again in vain."""
        if cursor.seen and cursor.unused == cursor.seen and (endless or self.settings.lanes == 1):
            key, reason = self.first_unused
            raise UserError(
                f"{self.plan.audio}: none of {cursor.seen} utterances can be used (first: {key}: {reason}), so there is nothing to learn; fix the data"
            )
        read = self.utterances * (cursor.number + 1)
        for count, (key, reason), what in (
            (cursor.unused, self.first_unused, "cannot be used"),
            (cursor.incomplete, self.first_incomplete, "lack the soft target of a teacher"),
        ):
            if count > self.settings.max_bad_share * read:
                raise UserError(
                    f"{self.plan.audio}: {count} of {read} utterances {what}, more than max_bad_share "
                    f"{self.settings.max_bad_share} (first: {key}: {reason}); fix the data or raise max_bad_share"
                )

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, self.phase, self.index, *place])

    def _blocks(self, lane: int, start: Cursor, passes: int | None) -> Iterator[list[Reading]]:
        block: list[Reading] = []
        for reading in self._readings(lane, start, passes):
            if block and (len(block) >= self.settings.bucket_utterances or reading.number != block[0].number):
                yield block
                block = []
            block.append(reading)
        if block:
            yield block

    def _readings(self, lane: int, start: Cursor, passes: int | None) -> Iterator[Reading]:
        lanes = self.settings.lanes
        # a set with fewer shards than lanes is read by all of them, each taking its share of the utterances
        whole = len(self.shards) * self.plan.repeat >= lanes
        if not whole and lane >= max(shard.samples for shard in self.shards):
            return  # nothing is left for it

        def places() -> Iterator[tuple[int, int, ShardInfo, int]]:
            for number in itertools.count(start.number) if passes is None else range(start.number, passes):
                rng = self._rng(number, 0)
                order = np.concatenate([rng.permutation(len(self.shards)) for _ in range(self.plan.repeat)])
                mine = order[lane::lanes] if whole else order
                first = start.shard if number == start.number else 0
                for index in range(first, len(mine)):
                    copy = (lane + index * lanes if whole else index) // len(self.shards)
                    yield number, index, self.shards[int(mine[index])], copy

        ours, theirs = itertools.tee(places())
        loads = (self._load(shard, number, copy) for number, _, shard, copy in theirs)
        contents = map_ordered(operator.call, loads, self.settings.loader_workers)
        for (number, index, shard, _), content in zip(ours, contents, strict=True):
            utterances: list[Item | tuple[str, str]] = [*content.bad, *content.items]
            utterances = utterances[slice(None) if whole else slice(lane, None, lanes)]
            targets = self._targets(shard) if "targets" in self.needs else None
            done = start.item if (number, index) == (start.number, start.shard) else 0
            for item, utterance in enumerate(utterances[done:], done):
                reading = Reading(number, index, item, [])
                if isinstance(utterance, Item):
                    key = utterance.key
                    self._learn(utterance, targets, reading)
                else:
                    key, reading.unused = utterance
                if reading.unused and not self.first_unused[0]:
                    self.first_unused = key, reading.unused
                if reading.incomplete and not self.first_incomplete[0]:
                    self.first_incomplete = key, reading.incomplete
                yield reading

    def _load(self, shard: ShardInfo, number: int, copy: int) -> Callable[[], LoadedShard]:
        """Reads a shard; `copy` counts how often it was read before in this pass: each time it is heard in another noise."""
        wanted = ShardInput(
            folder=self.plan.audio,
            features=self.settings.features,
            max_seconds=self.settings.max_seconds,
            cache=self.settings.feature_cache,
            noise=self.plan.augment.noise,
            noise_seed=(self.settings.seed, self.phase, number, self.index, copy),
        )
        return functools.partial(load_features, wanted, shard)

    def _targets(self, shard: ShardInfo) -> ShardTargets:
        with_prior = bool(self.plan.soft) and self.settings.missing_mass == "prior"
        return ShardTargets(self.plan, shard, self.units, self.settings.features.frame_ms, with_prior)

    def _learn(self, item: Item, targets: ShardTargets | None, reading: Reading) -> None:
        """Fill `reading` with what there is to learn from an utterance, or with what is in the way."""
        example = Example(item.key, item.features)
        if "text" in self.needs:
            reading.unused = self._label(item, example)
        if "lists" in self.needs:
            reading.unused = reading.unused or self._choices(item, example)
        if targets is not None and not reading.unused:
            found = targets.find(item.key, len(item.features))
            lacking = f"no soft target in {' and '.join(found.lacking)}" if found.lacking else ""
            if found.target is None:
                reading.unused = lacking
            else:
                reading.incomplete = lacking
            example.targets, example.prior = found.target, found.prior
        if not reading.unused:
            reading.examples = [example]
            if self.chunks and not self.chunks.carry:
                reading.examples = cut(example, self.chunks)

    def _label(self, item: Item, example: Example) -> str:
        """Give the example the units of its text; returns what is in the way, if anything is."""
        text = item.fields.get("text") if self.transcripts is None else self.transcripts.get(item.key)
        if text is None:
            return "no text to learn from"
        example.ids = self.units.encode(text)
        return self._misfit(text, example.ids, item)

    def _choices(self, item: Item, example: Example) -> str:
        """Give the example the units of its n-best list, of those texts that fit; returns what is in the way of all of them."""
        assert self.transcripts is not None
        found = [(text, self.units.encode(text), score) for text, score in self.transcripts.nbest(item.key)]
        reasons = [self._misfit(text, ids, item) for text, ids, _ in found]
        example.choices = [(ids, score) for (_, ids, score), reason in zip(found, reasons, strict=True) if not reason]
        return "" if example.choices else (reasons or ["no text to learn from"])[0]

    def _misfit(self, text: str, ids: list[int], item: Item) -> str:
        """Why CTC cannot learn a text, if it cannot."""
        if self.units.unknown in ids:
            return f"its text holds {self.units.unwritable(text)[0]!r}, which no unit covers"
        repeats = sum(a == b for a, b in itertools.pairwise(ids))
        # even when stretched to its shortest: CTC without a path has an infinite loss
        frames = round(len(item.features) * (1 - self.plan.augment.stretch))
        if len(ids) + repeats > frames:
            return f"{len(ids)} units do not fit into {frames} frames"
        return ""


def cut(example: Example, chunks: ChunkSettings) -> list[Example]:
    """The chunks of an utterance, each with its context; every frame is learned in one of them."""
    pieces = []
    total = len(example.features)
    for begin in range(0, total, chunks.frames):
        end = min(begin + chunks.frames, total)
        left, right = max(0, begin - chunks.left), min(total, end + chunks.right)
        targets = None if example.targets is None else example.targets[begin:end]
        features = example.features[left:right]
        pieces.append(
            Example(example.key, features, targets=targets, prior=example.prior, first=begin - left, last=end - left)
        )
    return pieces
