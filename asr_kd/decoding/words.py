"""The output of a decoder: words with their times and confidences, made from the spikes of a unit sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from asr_kd.units import Units


class Spike(NamedTuple):
    """A unit as CTC emits it: frames [start, end), and its highest probability in them."""

    unit: int
    start: int
    end: int
    probability: float

    def longer(self, following: Spike) -> Spike:
        """This spike, extended by the next frames of its unit."""
        return Spike(self.unit, self.start, following.end, max(self.probability, following.probability))


@dataclass(frozen=True)
class Token:
    """A unit of a word as `Units.piece` writes it; `start` and `end` in seconds, `confidence` the highest probability there.

    The times are those of the frames that emit the unit. CTC emits it as a spike somewhere within its sound (a streaming
    model after it), so they do not mark where the sound starts and ends.
    """

    piece: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Word:
    """A word as decoded; `start` and `end` in seconds of the audio, those of its first and its last token.

    The confidence, in 0 to 1, is the product of the tokens': it is the acoustic model's, without the language model.
    """

    text: str
    start: float
    end: float
    confidence: float
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """A text, its log-probability (natural; with a language model the weighted sum of both), and its words."""

    text: str
    score: float
    words: list[Word] = field(default_factory=list)


def group_words(units: Units, spikes: Sequence[Spike]) -> list[list[Spike]]:
    """The spikes word by word: a piece that starts with a space (`▁`) starts a word."""
    groups: list[list[Spike]] = []
    for spike in spikes:
        if not groups or units.starts_word(spike.unit):
            groups.append([])
        groups[-1].append(spike)
    return groups
