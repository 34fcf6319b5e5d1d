"""What is worth a look: the slices, those of them that are worst or changed most, and utterances to listen to."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from asr_kd.evaluation.parts import Line
from asr_kd.evaluation.schema import ChangedSlice, Interval, Sample, SliceErrors, SliceFigures, Slices, WorstSlice
from asr_kd.evaluation.scores import Resampler, Scores
from asr_kd.evaluation.significance import blocks_of, interval
from asr_kd.evaluation.slices import OTHERS, SLICE_WORDS

NAMED_SLICES = 5
ENOUGH = 4  # speakers of a slice; the interval of fewer is their range, and says little of what is sure
SAMPLES = 6  # utterances to listen to, of each kind


def sliced(resampler: Resampler, student: str) -> tuple[list[Slices], list[WorstSlice], list[ChangedSlice]]:
    """The slices of every field; those where the student is worst; those where it differs most from baseline and teacher."""
    found: list[Slices] = []
    worst: list[WorstSlice] = []
    changed: list[ChangedSlice] = []
    seen = set()  # utterances of the slices so far: a set that is one condition is named once
    scores, settings = resampler.scores, resampler.settings
    others = [one for one in dict.fromkeys((settings.baseline, settings.teacher)) if one and one != student]
    for slicing in scores.fields.slicings(resampler.words):
        values = []
        for number, value in enumerate(slicing.names):
            part = slicing.labels == number
            rates = resampler.rates(part)
            entry = _slice(value, part, rates, resampler)
            values.append(entry)
            utterances = hashlib.sha256(np.packbits(part).tobytes()).digest()
            if value == OTHERS or entry.words < SLICE_WORDS or utterances in seen:
                continue
            seen.add(utterances)
            where = {"field": slicing.field, **entry.model_dump(exclude={"systems"}), "system": student}
            mine = entry.systems[student]
            worst.append(WorstSlice(**where, **mine.model_dump()))
            for other in others:
                theirs = entry.systems[other].wer
                assert mine.wer is not None and theirs is not None  # it has words
                changed.append(ChangedSlice(
                    **where, wer=mine.wer, other=other, other_wer=theirs, difference=mine.wer - theirs,
                    interval=interval(rates[student] - rates[other]),
                ))  # fmt: skip
        found.append(Slices(field=slicing.field, bands=slicing.bands, values=values))
    overall = scores.tallies[student].counts.rate
    # by the end of the interval that is nearer to the overall rate, so that chance names no small slice
    worst = sorted(
        (one for one in worst if one.wer > overall),
        key=lambda one: (one.number < ENOUGH, -(one.interval[0] if one.interval else one.wer)),
    )
    changed.sort(key=lambda one: (one.number < ENOUGH, -_surely(one.interval), -abs(one.difference)))
    most = [[one for one in changed if one.other == other and one.difference][:NAMED_SLICES] for other in others]
    return found, worst[:NAMED_SLICES], list(itertools.chain(*most))


def _slice(value: str | None, part: np.ndarray, rates: dict[str, np.ndarray], resampler: Resampler) -> SliceFigures:
    words = int(resampler.words[part].sum())
    systems = {}
    for row, (name, drawn) in enumerate(rates.items()):
        errors = int(resampler.errors[row][part].sum())
        systems[name] = SliceErrors(wer=errors / words if words else None, interval=interval(drawn), errors=errors)
    blocks, number, _ = blocks_of(resampler.speakers[part])
    return SliceFigures(
        value=value, utterances=int(part.sum()), words=words, blocks=blocks, number=number, systems=systems
    )


def _surely(bounds: Interval | None) -> float:
    """How far an interval of differences is from 0."""
    return max(bounds[0], -bounds[1], 0.0) if bounds else 0.0


def samples(scores: Scores, student: str) -> list[Sample]:
    """Utterances to listen to: the student's worst, then those that changed most against the baseline."""
    found: dict[tuple[str, str, str], Sample] = {}

    def take(line: Line, errors: int, compared: str = "") -> None:
        key, set, shard = line["key"], line["set"], line["shard"]
        why = f"{student}: {errors} error{'' if errors == 1 else 's'}{compared}"
        found.setdefault((set, shard, key), Sample(key=key, set=set, shard=shard, why=why))

    for errors, _, _, line, _ in sorted(scores.tallies[student].worst, reverse=True)[:SAMPLES]:
        take(line, errors)
    for errors, _, change, line in sorted(scores.changed[student], reverse=True):
        if len(found) < 2 * SAMPLES:
            take(line, errors, f" {'more' if change > 0 else 'fewer'} than {scores.reference}")
    return list(found.values())
