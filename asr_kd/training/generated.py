"""A source without audio: utterances of noise, or what is drawn for a generator, in an order and with bits that depend on the seed alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from asr_kd.distillation.batch import Example
from asr_kd.errors import UserError
from asr_kd.targets.moments import read_moments
from asr_kd.training.sources import Cursor, Reading, Source


class GeneratedSource(Source):
    """As a source of audio, but its utterances are drawn: each by the seed, the pass and its number.

    Raises:
        UserError: when the moments cannot be used, or the utterances are shorter than a frame.
    """

    def _open(self) -> None:
        generated, features = self.plan.generated, self.settings.features
        assert generated is not None
        self.frames = round(generated.seconds * 1000 / features.frame_ms)
        if not self.frames:
            raise UserError(
                f"generated.seconds: {generated.seconds:g} s are no whole frame of {features.frame_ms} ms; raise it"
            )
        # of a generator they are in its weights, and it draws white noise
        self.moments = (
            read_moments(generated.moments, features.dimension) if generated.moments and not generated.trained else None
        )
        self.utterances = generated.utterances * self.plan.repeat
        self.seconds = self.utterances * self.frames * features.frame_ms / 1000

    def _readings(self, lane: int, start: Cursor, passes: int | None) -> Iterator[Reading]:
        if lane >= self.utterances:
            return  # none is left for this lane
        mine = range(lane, self.utterances, self.settings.lanes)
        for number in itertools.count(start.number) if passes is None else range(start.number, passes):
            done = start.item if number == start.number else 0
            for item, utterance in enumerate(mine[done:], done):
                rows = self._rng(number, 3, utterance).standard_normal(
                    (self.frames, self.settings.features.dimension), np.float32
                )
                features = (self.moments.coloured(rows) if self.moments else rows).astype(np.float16)
                yield Reading(number, 0, item, self._cut(Example(f"generated-{number}-{utterance}", features)), "", "")
