"""A source of a phase: shards → examples → batches, lane by lane, in an order that depends on the seed alone.

A pass reads the shards of a lane in random order. Examples are collected until there are `bucket_utterances` of them, or the
pass ends: a block. Its batches, of similar lengths, come in random order. Random numbers are drawn by pass or by block, so
that a resumed run reads no more than the shards of one block again.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from asr_kd.audio.noise import check_noise_files
from asr_kd.audio.settings import SoundSettings
from asr_kd.distillation.answers import NO_ONE, Foreign
from asr_kd.distillation.batch import Example
from asr_kd.distillation.opinion import Opinion
from asr_kd.distillation.stored import stored_hidden
from asr_kd.errors import UserError
from asr_kd.shards.chosen import Chosen, Pairs
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.manifest import Transcripts
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.stream import Item, LoadedShard, ShardInput, bucketed, load_features, map_ordered
from asr_kd.shards.tarset import INDEX, read_index
from asr_kd.training.settings import ChunkSettings, TrainSettings
from asr_kd.training.teachers import ShardTargets
from asr_kd.units import Units

#: share by which the audio of a shard may differ from what the index says of it
SECONDS_OFF = 0.1


@dataclass
class Cursor:
    """Position of a lane of a source: the start of a block, and how many of the block's batches were given out.

    Attributes:
        number: number of finished passes.
        shard: shard of the block's first utterance, counted in the order of the pass.
        item: the block's first utterance in that shard, or one past the shard's end.
        block: number of blocks of this pass before this one.
        batch: number of batches of this block given out.
        seconds: audio given out, in all passes.
        seen: utterances before this block.
        unused: those of them that could not be used.
        incomplete: those of them that some teacher has no target for.
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
class Met:
    """What this process met in a source.

    Attributes:
        ends: for lanes that have ended, the cursor at their end.
        unused: key and reason of the first utterance that could not be used.
        incomplete: key and reason of the first utterance without every teacher's target.
    """

    ends: dict[int, Cursor] = field(default_factory=dict)
    unused: tuple[str, str] = ("", "")
    incomplete: tuple[str, str] = ("", "")


class Reading(NamedTuple):
    """An utterance as it was read: its place (see `Cursor`), and what there is to learn from it, one example or its chunks.

    Attributes:
        unused: why there is nothing to learn; empty if there is.
        incomplete: which teachers' targets are missing; empty if none are.
    """

    number: int
    shard: int
    item: int
    examples: list[Example]
    unused: str
    incomplete: str


class Source:
    """A source of a phase, opened once for all its lanes.

    Args:
        phase: index of its phase in the settings.
        index: index of the source in its phase.
        units: vocabulary of the learner; soft targets over another vocabulary are refused.
        foreign: teachers from outside that answer in the step.
        on_device: whether features are to be made where the network is.

    Attributes:
        deferred: whether they are. Those of a cache are there, drawn ones are no sound, and chunks are cut from those of whole utterances.

    Raises:
        UserError: when the shards hold no utterances, or lack lengths that the schedule needs.
    """

    def __init__(
        self,
        settings: TrainSettings,
        phase: int,
        index: int,
        units: Units,
        foreign: Mapping[str, Foreign] = NO_ONE,
        on_device: bool = False,
    ) -> None:
        self.settings, self.phase, self.index, self.units = settings, phase, index, units
        schedule = settings.phases[phase]
        self.plan, self.chunks = schedule.sources[index], schedule.chunks
        self.audio, self.needs, self.met = self.plan.audio or self.plan.name, self.plan.needs, Met()
        cut = self.chunks is not None and not self.chunks.carry
        self.deferred = on_device and not (settings.feature_cache or self.plan.generated or cut)
        self.chosen: Chosen | Pairs | None = None
        self.sound = _sound_of({name: foreign[name] for name in self.plan.teachers if name in foreign})
        if self.sound:
            self._check_whole()
        self._open()

    def _check_whole(self) -> None:
        """Refuse what a teacher that hears sound cannot answer: it hears whole utterances as they were."""
        changes = {
            "generated makes features and no sound": self.plan.generated, "chunks cut what the student hears": self.chunks,
            "augment.stretch changes what the student hears": self.plan.augment.stretch,
        }  # fmt: skip
        if what := next((what for what, there in changes.items() if there), None):
            raise UserError(
                f"teacher: {what}, and a teacher from outside hears whole utterances as they were; leave it out, or label the audio and learn "
                "the targets"
            )

    def _open(self) -> None:
        schedule = self.settings.phases[self.phase]
        self.pairs = Pairs(self.plan.pairs, self.audio) if self.plan.pairs else None
        self.chosen = Chosen(self.plan.only, self.audio) if self.plan.only else self.pairs
        self.shards = (self.chosen.shards if self.chosen else read_index(self.audio)).filled
        self.transcripts = Transcripts(self.plan.transcripts) if self.plan.transcripts else None
        self.seconds = self.shards.seconds * self.plan.repeat
        self.utterances = self.shards.samples * self.plan.repeat
        if self.plan.augment.noise and self.plan.augment.noise.folder:
            check_noise_files(self.plan.augment.noise.folder)
        self.held = stored_hidden(self.plan)
        self.opinion = Opinion(self.plan.opinion, self.units) if self.plan.opinion else None
        if not self.utterances:
            raise UserError(f"{self.audio}: holds no utterances; prepare the audio shards again")
        self.steered = schedule.hours is None or (self.plan.weight is None and len(schedule.sources) > 1)
        if self.steered and (silent := self.shards.without_seconds):
            raise UserError(
                f"{self.audio}: {INDEX} says nothing of the length of {silent}, by which learning rate and mixture are steered; "
                "prepare the audio shards again, or write `seconds` into their JSON and index them anew"
            )

    def batches(self, lane: int, start: Cursor, passes: int | None) -> Iterator[tuple[list[Example], Cursor]]:
        """Batches of a lane from `start` on, each with the cursor after it; without `passes` they never end.

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
            frames = (self.plan.batch_frames or self.settings.batch_frames) // self.plan.copies
            for number, batch in enumerate(bucketed(held, lambda one: len(one.features), frames, rng), 1):
                if number > cursor.batch:
                    seconds = sum(one.frames for one in batch) * self.settings.features.frame_ms / 1000
                    cursor = replace(cursor, batch=number, seconds=cursor.seconds + seconds)
                    yield batch, cursor
            cursor = replace(
                cursor, shard=block[-1].shard, item=block[-1].item + 1, block=cursor.block + 1, batch=0,
                seen=cursor.seen + len(block), unused=cursor.unused + sum(bool(one.unused) for one in block),
                incomplete=cursor.incomplete + sum(bool(one.incomplete) for one in block),
            )  # fmt: skip
        self._refuse_bad(cursor)
        self.met.ends[lane] = cursor

    def _refuse_bad(self, cursor: Cursor, endless: bool = False) -> None:
        """Fail if the share of bad utterances is too high whatever other lanes bring, or a lane would loop for ever in vain."""
        alone = endless or self.settings.lanes == 1
        read = cursor.seen if alone and cursor.unused == cursor.seen else self.utterances * (cursor.number + 1)
        for bad in self.bad(read, cursor.unused, cursor.incomplete):
            bad.refuse(str(self.audio), "fix the data")

    def bad(self, read: int, unused: int, incomplete: int) -> tuple[Quarantine, Quarantine]:
        """The utterances of so many `read` that cannot be used, and that lack the target of a teacher."""
        share = self.settings.max_bad_share
        return (
            Quarantine(read, share, "used", unused, self.met.unused),
            Quarantine(read, share, "taught by every teacher", incomplete, self.met.incomplete, all_may=True),
        )

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, self.phase, self.index, *key])

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
        # if there are fewer shards than lanes, all lanes read all shards, and each takes its share of the utterances
        whole = len(self.shards) * self.plan.repeat >= lanes
        if not whole and lane >= max(shard.samples for shard in self.shards):
            return  # no utterance is left for this lane

        def positions() -> Iterator[tuple[int, int, ShardInfo, int]]:
            for number in itertools.count(start.number) if passes is None else range(start.number, passes):
                rng = self._rng(number, 0)
                order = np.concatenate([rng.permutation(len(self.shards)) for _ in range(self.plan.repeat)])
                mine = order[lane::lanes] if whole else order
                first = start.shard if number == start.number else 0
                for index in range(first, len(mine)):
                    copy = (lane + index * lanes if whole else index) // len(self.shards)
                    yield number, index, self.shards[int(mine[index])], copy

        ours, theirs = itertools.tee(positions())
        loads = (self._load(shard, number, copy) for number, _, shard, copy in theirs)
        contents = map_ordered(operator.call, loads, self.settings.loader_workers)
        for (number, index, shard, _), content in zip(ours, contents, strict=True):
            heard: list[tuple[str, Item | str]] = [*content.bad, *((item.key, item) for item in content.items)]
            if self.chosen:
                self.chosen.check(shard.name, (key for key, _ in heard))
            self._check_seconds(shard, content)
            heard = heard[slice(None) if whole else slice(lane, None, lanes)]
            targets = None
            if self.plan.targets:
                with_prior = "targets" in self.needs and self.settings.missing_mass == "prior"
                period = self.settings.features.frame_ms
                pairs = self.pairs.of(shard.name) if self.pairs else None
                targets = ShardTargets(self.plan, shard, self.units, period, with_prior, self.held, self.opinion, pairs)
            done = start.item if (number, index) == (start.number, start.shard) else 0
            for number_in_shard, (key, utterance) in enumerate(heard[done:], done):
                reading = Reading(number, index, number_in_shard, *self._learn(utterance, targets))
                if reading.unused and not self.met.unused[0]:
                    self.met.unused = key, reading.unused
                if reading.incomplete and not self.met.incomplete[0]:
                    self.met.incomplete = key, reading.incomplete
                yield reading

    def _check_seconds(self, shard: ShardInfo, content: LoadedShard) -> None:
        """Compare the audio of a shard with what the index says of it, where that steers the learning rate and all of it was heard."""
        heard = sum(item.seconds for item in content.items)
        if self.steered and not content.bad and abs(heard - shard.seconds) > SECONDS_OFF * max(heard, shard.seconds):
            told = f"{self.chosen.path} or {INDEX}" if self.chosen else INDEX
            raise UserError(
                f"{self.audio}: {shard.name} holds {heard:,.1f} s of audio, {told} says {shard.seconds:,.1f}, by which learning rate "
                "and mixture are steered; correct `seconds` there, or prepare the audio shards again"
            )

    def _load(self, shard: ShardInfo, number: int, copy: int) -> Callable[[], LoadedShard]:
        """A function that reads a shard; `copy`, how often this pass has read it before, is in the seed of its noise."""
        wanted = ShardInput(
            folder=self.audio, features=self.settings.features, max_seconds=self.settings.max_seconds,
            cache=self.settings.feature_cache, noise=self.plan.augment.noise,
            noise_seed=(self.settings.seed, self.phase, number, self.index, copy), keep_clean=bool(self.plan.teacher),
            sound=self.sound, deferred=self.deferred,
            only=self.chosen.keys(shard.name) if self.chosen else None,
        )  # fmt: skip
        return functools.partial(load_features, wanted, shard)

    def text_of(self, key: str, fields: dict[str, Any]) -> str | None:
        """The text of an utterance, of its transcripts or else of its shard."""
        return fields.get("text") if self.transcripts is None else self.transcripts.get(key)

    def _learn(self, item: Item | str, targets: ShardTargets | None) -> tuple[list[Example], str, str]:
        """See `Reading`: the examples of an utterance, `unused` and `incomplete`; for an unusable one it gets the reason."""
        if isinstance(item, str):
            return [], item, ""
        example, unused, incomplete = Example(item.key, item.features, clean=item.clean, sound=item.sound), "", ""
        if "text" in self.needs:
            text = self.text_of(item.key, item.fields)
            spelled, unused = self._spelled([] if text is None else [(text, 0.0)], len(item.features))
            example.ids = spelled[0][0] if spelled else None
        if "lists" in self.needs and self.transcripts and not unused:
            example.choices, unused = self._spelled(self.transcripts.nbest(item.key), len(item.features))
        if targets is not None and not unused:
            found = targets.find(item.key, len(item.features))
            lacking = f"no soft target in {' and '.join(found.lacking)}" if found.lacking else ""
            unused, incomplete = (lacking, "") if found.target is None else ("", lacking)
            example.targets, example.prior, example.hidden = found.target, found.prior, found.hidden
        if unused:
            return [], unused, ""
        return self._cut(example), "", incomplete

    def _cut(self, example: Example) -> list[Example]:
        """An example of its own, or its chunks."""
        return cut(example, self.chunks) if self.chunks and not self.chunks.carry else [example]

    def _spelled(self, texts: list[tuple[str, float]], frames: int) -> tuple[list[tuple[list[int], float]], str]:
        """Unit ids and score of those texts that CTC can learn from so many frames; and if there are none, why."""
        spelled = [(text, self.units.encode(text), score) for text, score in texts]
        # they must fit even when compressed most: without a path the CTC loss is infinite
        fewest = round(frames * (1 - self.plan.augment.stretch))
        reasons = [self.units.misfit(text, ids, fewest) for text, ids, _ in spelled] or ["no text to learn from"]
        fitting = [(ids, score) for (_, ids, score), reason in zip(spelled, reasons, strict=False) if not reason]
        return fitting, "" if fitting else reasons[0]


def _sound_of(foreign: Mapping[str, Foreign]) -> SoundSettings | None:
    """The sound that all of these teachers from outside can hear; None without any."""
    rates = {name: one.sound.sample_rate for name, one in foreign.items()}
    if len(set(rates.values())) > 1:
        said = " and ".join(f"{name} {rate}" for name, rate in rates.items())
        raise UserError(
            f"teacher: they hear sound of several rates in Hz ({said}); give one, or label the audio with each"
        )
    # the one that needs most of an utterance
    return max((one.sound for one in foreign.values()), key=lambda sound: sound.least, default=None)


def cut(example: Example, chunks: ChunkSettings) -> list[Example]:
    """The chunks of an utterance, each with its context; every frame is learned in exactly one."""
    pieces, total = [], len(example.features)
    for begin in range(0, total, chunks.frames):
        end = min(begin + chunks.frames, total)
        left, right = max(0, begin - chunks.left), min(total, end + chunks.right)
        clean = None if example.clean is None else example.clean[left:right]
        targets = None if example.targets is None else example.targets[begin:end]
        hidden = None if example.hidden is None else example.hidden[begin:end]
        features = example.features[left:right]
        pieces.append(
            replace(
                example,
                features=features,
                clean=clean,
                targets=targets,
                hidden=hidden,
                first=begin - left,
                last=end - left,
            )
        )
    return pieces
