"""Batches from the mixed sources of a phase, in an order that depends on the seed alone, starting at any saved position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_kd.audio.augment import Masks, Stretch, draw_masks, draw_stretch, in_time, masked, stretched
from asr_kd.audio.batched import Input, Sounds
from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.answers import NO_ONE, Foreign, taught_by
from asr_kd.distillation.batch import Batch, Example, Part
from asr_kd.distillation.knowledge import Task, lesson_of
from asr_kd.models.acoustic import collate
from asr_kd.targets.hidden import CODES
from asr_kd.training.generated import GeneratedSource
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Cursor, Source
from asr_kd.units import Units


@dataclass
class Lane:
    """Position of a lane of a phase: the number of batches given out, and a cursor for each source."""

    order: int = 0
    cursors: list[Cursor] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Lane:
        """The reverse of `asdict`."""
        return cls(value["order"], [Cursor(**cursor) for cursor in value["cursors"]])


class PhaseStream:
    """The batches of one phase, lane by lane.

    Args:
        phase: index of the phase in the settings.
        units: vocabulary of the learner; soft targets over another vocabulary are refused.
        foreign: teachers from outside that answer in the step.
        on_device: whether the features are made where the network is, as far as that can be (`Source.deferred`).

    Attributes:
        lessons: for each source, what is learned from it.
        passes: passes over all sources in a cycle; None if the phase is measured in hours.
        seconds: audio in one cycle of the phase, all lanes together.
    """

    def __init__(
        self,
        settings: TrainSettings,
        phase: int,
        units: Units,
        foreign: Mapping[str, Foreign] = NO_ONE,
        on_device: bool = False,
    ) -> None:
        self.settings, self.phase, self.units, self.foreign = settings, phase, units, dict(foreign)
        self.plan, self.on_device = settings.phases[phase], on_device
        self.sources = [
            (GeneratedSource if source.generated else Source)(settings, phase, index, units, foreign, on_device)
            for index, source in enumerate(self.plan.sources)
        ]
        task = Task(units, settings.features, settings.model, settings.missing_mass)
        self.lessons = [
            lesson_of(source, replace(task, taught=taught_by(source, settings.model, foreign)))
            for source in self.plan.sources
        ]
        self.passes = self.plan.passes
        if self.plan.hours is not None:
            self.seconds = self.plan.hours * 3600
        else:
            once = sum(source.seconds for source in self.sources)
            self.passes = max(self.plan.passes or 1, math.ceil(self.plan.hours_at_least * 3600 / max(once, 1.0)))
            self.seconds = once * self.passes

    def start(self) -> list[Lane]:
        """The start position of every lane."""
        return [Lane(0, [Cursor() for _ in self.sources]) for _ in range(self.settings.lanes)]

    def batches(
        self, lanes: list[Lane], cycle: int, turn: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch | None]:
        """The batches of one process, up to the end of the cycle.

        The lanes take turns, as many at a time as there are processes, so the order of the whole job does not depend on the
        number of processes.

        Args:
            lanes: position of each lane.
            cycle: cycle of the schedule, from 0.
            turn: the lane whose batch is next.

        Yields:
            a batch for each turn of a lane of this process, None if the lane has ended. Stops when all lanes of the process
            have ended.
        """
        own = sorted(range(rank, self.settings.lanes, ranks), key=lambda lane: lane < turn)
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
        """The batches of a lane: its sources mixed so that all advance at the same pace, in passes or by weight."""
        passes = None if self.passes is None else self.passes * (cycle + 1)
        hours = None if self.plan.hours is None else self.plan.hours * (cycle + 1) * 3600 / self.settings.lanes
        paces = [source.plan.weight or source.seconds or 1.0 for source in self.sources]
        cursors, live, order = list(start.cursors), set(range(len(self.sources))), start.order
        streams = [source.batches(lane, at, passes) for source, at in zip(self.sources, cursors, strict=True)]
        while live and (hours is None or sum(cursor.seconds for cursor in cursors) < hours):
            index = min(live, key=lambda index: (cursors[index].seconds / paces[index], index))
            examples, cursor = next(streams[index], (None, None))
            if examples is None or cursor is None:
                live.remove(index)
                continue
            seed = (self.settings.seed, self.phase, index, lane, 1, order)
            batch = self._collate(examples, index, np.random.default_rng(seed))
            batch.draws = (*seed, 1)
            batch.seconds = cursor.seconds - cursors[index].seconds
            cursors[index], order = cursor, order + 1
            batch.lane, batch.after = lane, Lane(order, list(cursors))
            yield batch

    def _collate(self, examples: list[Example], source: int, rng: np.random.Generator) -> Batch:
        plan, like = self.plan.sources[source], self.settings.features
        augment = plan.augment
        drawn = [draw_stretch(len(example.features), augment, rng) for example in examples]
        # views: all utterances, then all again, alike but for their masks
        masks = [draw_masks(one.frames, like, augment, rng) for one in drawn * plan.copies]
        coming = None
        if self.sources[source].deferred:
            coming = _coming(examples, like, drawn, masks, bool(plan.teacher))
            features = torch.empty(len(masks), max(one.frames for one in drawn), 0)
        else:
            features = _heard(examples, like, drawn, masks)
        examples, drawn = examples * plan.copies, drawn * plan.copies
        lengths = torch.tensor([one.frames for one in drawn])
        first = torch.tensor([example.first for example in examples])
        # a stretch changes the number of frames; chunks are never stretched
        last = lengths if augment.stretch else torch.tensor([example.last for example in examples])
        batch = Batch(features, lengths, first, last, source, coming=coming)
        if plan.teacher and coming is None:
            batch.clean = _clean(examples, like, drawn)
        sounds = [torch.from_numpy(example.sound) for example in examples if example.sound is not None]
        if sounds:
            batch.parts["sound"] = Part(torch.cat(sounds), torch.tensor([len(one) for one in sounds]))
        needs = plan.needs
        if "text" in needs:
            ids: list[list[int]] = [example.ids or [] for example in examples]
            row = torch.tensor([unit for one in ids for unit in one], dtype=torch.int64)
            batch.parts["text"] = Part(row, torch.tensor([len(one) for one in ids]))
        if "targets" in needs and not plan.teacher:
            # targets are stretched like the features
            shown = [one.origin if augment.stretch else slice(None) for one in drawn]
            batch.parts |= _soft(examples, shown)
            batch.parts |= _hidden(examples, shown, self.lessons[source].taught)
        lesson = self.lessons[source]
        for kind in lesson.kinds:
            if kind not in lesson.answered:
                kind.prepare(examples, batch, rng)
        return batch


def _heard(examples: list[Example], like: FeatureSettings, drawn: list[Stretch], masks: list[Masks]) -> Tensor:
    """Features of all copies of a batch, changed as was drawn."""
    copies = len(masks) // len(examples)
    rows = [stretched(one.features, like.stack, how) for one, how in zip(examples, drawn, strict=True)] * copies
    return collate([masked(one, like.stack, hidden) for one, hidden in zip(rows, masks, strict=True)])[0]


def _clean(examples: list[Example], like: FeatureSettings, drawn: list[Stretch]) -> Tensor:
    """Features of a batch without noise, masks and another vocal tract."""
    clean = [example.features if example.clean is None else example.clean for example in examples]
    return collate([in_time(rows, like.stack, how) for rows, how in zip(clean, drawn, strict=True)])[0]


def _coming(
    examples: list[Any], like: FeatureSettings, drawn: list[Stretch], masks: list[Masks], with_clean: bool
) -> Input:
    """What `_heard` and `_clean` are made of, where the sound is heard by the network's device."""
    clean = [example.clean for example in examples if example.clean is not None]
    sounds = Sounds.of([example.features for example in examples])
    return Input(like, sounds, drawn, masks, with_clean, Sounds.of(clean) if clean else None)


def _soft(examples: list[Example], shown: list[Any]) -> dict[str, Part]:
    """The soft targets of a batch; `shown` selects the rows (frames) of each utterance."""
    targets: list[Any] = [example.targets for example in examples]
    k = max(int(target.counts.max()) for target in targets)
    padded = [(*target.padded(k), target.tail) for target in targets]
    rows = [[array[at] for array in arrays] for arrays, at in zip(padded, shown, strict=True)]
    units, probs, tail = (torch.from_numpy(np.concatenate(column)) for column in zip(*rows, strict=True))
    parts = {"soft.units": Part(units), "soft.probs": Part(probs), "soft.tail": Part(tail)}
    priors = {id(example.prior): example.prior for example in examples if example.prior is not None}
    if priors:
        numbers = {name: number for number, name in enumerate(priors)}
        which = torch.tensor([numbers[id(example.prior)] for example in examples])
        parts["soft.prior"] = Part(which.repeat_interleave(torch.tensor([len(row[2]) for row in rows])))
        parts["soft.priors"] = Part(torch.from_numpy(np.stack(list(priors.values()))), whole=True)
    return parts


def _hidden(examples: list[Example], shown: list[Any], names: Sequence[str]) -> dict[str, Part]:
    """The stored hidden states and codes of a batch; `shown` as of `_soft`."""
    parts = {}
    for name in names:
        rows = [
            example.hidden.of_frames(name)[at] for example, at in zip(examples, shown, strict=True) if example.hidden
        ]
        parts[name if name.startswith(CODES) else f"hidden.{name}"] = Part(torch.from_numpy(np.concatenate(rows)))
    return parts
