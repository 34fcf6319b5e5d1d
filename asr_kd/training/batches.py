"""What the trainer eats: batches from the mixed sources of a phase, in an order that the seed alone decides, from any place on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_kd.audio.augment import spec_augment, stretched
from asr_kd.distillation.sequences import draw_from_lists, draw_sequences
from asr_kd.models.acoustic import collate
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Cursor, Example, Source
from asr_kd.units import Units


@dataclass
class Lane:
    """Where a lane of a phase stands: the batches it has given out, and a cursor for each source."""

    order: int = 0
    cursors: list[Cursor] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Lane:
        """What `to_json` made."""
        return cls(value["order"], [Cursor(**cursor) for cursor in value["cursors"]])


@dataclass
class Batch:
    """One step's input.

    Attributes:
        features: float32 [batch, frames, inputs]; lengths: int64 [batch].
        first, last: int64 [batch], the frames that are learned: from first to before last; the others are context.
        source: which source of the phase it came from; seconds: of audio to learn, before any stretch.
        labels, label_lengths: unit ids of all utterances in a row and how many each has; None without CTC.
        drawn, drawn_lengths: the same of transcripts that were drawn, one of each utterance, then a second of each, and so on; None
            without `sequences`.
        units, probs: [learned frames of all utterances, k], tail: [learned frames]; None without soft targets.
        priors, prior: float32 [shards, units], in whose proportions the tail is spread, and int64 [learned frames],
            which of them is the frame's; None unless `missing_mass` is prior.
        spelling: the units, by which labels become words; None without `mwer`.
        lane, after: which lane gave it, and where that stands behind it.
    """

    features: Tensor
    lengths: Tensor
    first: Tensor
    last: Tensor
    source: int
    labels: Tensor | None = None
    label_lengths: Tensor | None = None
    drawn: Tensor | None = None
    drawn_lengths: Tensor | None = None
    units: Tensor | None = None
    probs: Tensor | None = None
    tail: Tensor | None = None
    priors: Tensor | None = None
    prior: Tensor | None = None
    spelling: Units | None = None
    seconds: float = 0.0
    lane: int = 0
    after: Lane = field(default_factory=Lane)

    @property
    def frames(self) -> int:
        """Frames that are learned; neither padding nor context."""
        return int((self.last - self.first).sum())


class PhaseStream:
    """The batches of one phase, lane by lane.

    Args:
        settings: of the run.
        phase: the phase's position.
        units: of the learner; soft targets over other units are refused.

    Attributes:
        sources: of the phase; passes: over all of them in a cycle, None where hours are asked for.
        seconds: of audio in one cycle of the phase, by all lanes.
    """

    def __init__(self, settings: TrainSettings, phase: int, units: Units) -> None:
        self.settings, self.phase, self.units = settings, phase, units
        self.plan = settings.phases[phase]
        self.sources = [Source(settings, phase, index, units) for index in range(len(self.plan.sources))]
        self.passes = self.plan.passes
        if self.plan.hours is not None:
            self.seconds = self.plan.hours * 3600
        else:
            once = sum(source.seconds for source in self.sources)
            self.passes = max(self.plan.passes or 1, math.ceil(self.plan.hours_at_least * 3600 / max(once, 1.0)))
            self.seconds = once * self.passes

    def start(self) -> list[Lane]:
        """The beginning, for every lane."""
        return [Lane(0, [Cursor() for _ in self.sources]) for _ in range(self.settings.lanes)]

    def batches(
        self, lanes: list[Lane], cycle: int, turn: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch | None]:
        """What one of several processes gets to learn, to the end of the cycle.

        The lanes take turns, as many at a time as there are processes: the whole job's order is the same for any number of them.

        Args:
            lanes: where each stands; cycle: of the schedule, from 0; turn: the lane whose batch is next.

        Yields:
            a batch for each turn of a lane of this process, None when the lane has come to its end. When all of the process's
            have, this ends.
        """
        own = [lane for lane in range(self.settings.lanes) if lane % ranks == rank]
        own = [lane for lane in own if lane >= turn] + [lane for lane in own if lane < turn]
        streams = {lane: self._lane(lane, lanes[lane], cycle) for lane in own}
        ended: set[int] = set()
        while len(ended) < len(own):
            for lane in own:
                batch = next(streams[lane], None)
                if batch is None:
                    ended.add(lane)
                    if len(ended) == len(own):
                        return
                yield batch

    def _lane(self, lane: int, start: Lane, cycle: int) -> Iterator[Batch]:
        """The sources of a lane, mixed so that all advance at the same pace, in passes or by their weights."""
        passes = None if self.passes is None else self.passes * (cycle + 1)
        hours = None if self.plan.hours is None else self.plan.hours * (cycle + 1) * 3600 / self.settings.lanes
        paces = [source.plan.weight or source.seconds or 1.0 for source in self.sources]
        streams = [
            source.batches(lane, cursor, passes) for source, cursor in zip(self.sources, start.cursors, strict=True)
        ]
        cursors, live, order = list(start.cursors), set(range(len(streams))), start.order
        while live and (hours is None or sum(cursor.seconds for cursor in cursors) < hours):
            index = min(live, key=lambda index: (cursors[index].seconds / paces[index], index))
            examples, cursor = next(streams[index], (None, None))
            if examples is None or cursor is None:
                live.remove(index)
                continue
            rng = np.random.default_rng([self.settings.seed, self.phase, index, lane, 1, order])
            batch = self._collate(examples, index, rng)
            batch.seconds = cursor.seconds - cursors[index].seconds
            cursors[index], order = cursor, order + 1
            batch.lane, batch.after = lane, Lane(order, list(cursors))
            yield batch

    def _collate(self, examples: list[Example], source: int, rng: np.random.Generator) -> Batch:
        augment, like = self.plan.sources[source].augment, self.settings.features
        changed = [stretched(example.features, like.stack, augment, rng) for example in examples]
        features, lengths = collate([spec_augment(rows, like, augment, rng) for rows, _ in changed])
        first = torch.tensor([example.first for example in examples])
        # a stretch changes how many frames there are; chunks have none
        last = lengths if augment.stretch else torch.tensor([example.last for example in examples])
        batch = Batch(features, lengths, first, last, source)
        if self.plan.sources[source].ctc:
            ids: list[list[int]] = [example.ids or [] for example in examples]
            batch.labels = torch.tensor([unit for row in ids for unit in row], dtype=torch.int64)
            batch.label_lengths = torch.tensor([len(row) for row in ids])
        if self.plan.sources[source].mwer:
            batch.spelling = self.sources[source].units
        sequences = self.plan.sources[source].sequences
        if sequences and self.plan.sources[source].reads_lists:
            batch.drawn, batch.drawn_lengths = draw_from_lists([one.choices for one in examples], sequences, rng)
        if self.plan.sources[source].reads_targets:
            targets: list[Any] = [example.targets for example in examples]
            k = max(int(target.counts.max()) for target in targets)
            padded = [(*target.padded(k), target.tail) for target in targets]
            # a stretch takes the targets with it
            shown = [origin if augment.stretch else slice(None) for _, origin in changed]
            units, probs, tails = zip(
                *([array[at] for array in arrays] for arrays, at in zip(padded, shown, strict=True)), strict=True
            )
            batch.units = torch.from_numpy(np.concatenate(units))
            batch.probs = torch.from_numpy(np.concatenate(probs))
            batch.tail = torch.from_numpy(np.concatenate(tails))
            if sequences:
                batch.drawn, batch.drawn_lengths = draw_sequences(batch.units, batch.probs, lengths, sequences, rng)
            shards = {id(example.prior): example.prior for example in examples if example.prior is not None}
            if shards:
                places = {name: place for place, name in enumerate(shards)}
                batch.priors = torch.from_numpy(np.stack(list(shards.values())))
                which = torch.tensor([places[id(example.prior)] for example in examples])
                batch.prior = which.repeat_interleave(torch.tensor([len(tail) for tail in tails]))
        return batch
