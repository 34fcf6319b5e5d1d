"""Systems of two earlier reports, utterance by utterance: whether they differ by more than chance.

Both reports' `utterances.jsonl` are read side by side; of an utterance a few numbers are held, never its texts.
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass

import numpy as np

from asr_kd.evaluation.earlier import Earlier
from asr_kd.evaluation.schema import Pair
from asr_kd.evaluation.significance import MatchedPairs, blocks_of, compared, marks, resampled_rates, segments
from asr_kd.evaluation.utterances import by_utterance, edits_of, read_lines
from asr_kd.files import Place


@dataclass(frozen=True)
class Side:
    """A report, what it is called in the comparison, and where its `utterances.jsonl` would be."""

    letter: str
    report: Earlier
    lines: Place


def counterparts(first: Earlier, second: Earlier) -> list[tuple[str, str]]:
    """Systems of the second report with those of the first that they are compared with: of the same name, else both students."""
    names = [(name, name) for name in second.systems if name in first.systems]
    if second.student and first.student and second.student not in first.systems:
        names.append((second.student, first.student))
    return names


def paired(first: Side, second: Side) -> tuple[list[Pair], str] | str:
    """Tests of the second report's systems against their counterparts in the first and what they rest on, or why there are none."""
    names = counterparts(first.report, second.report)
    if not names:
        return f"no system of {second.letter} has a counterpart in {first.letter}, by name or as the student"
    words, speakers, numbers = array("i"), array("i"), dict[str | None, int]({None: -1})
    counted = [(array("i"), array("i")) for _ in names]  # errors of each utterance
    tests = [MatchedPairs() for _ in names]
    sides = [by_utterance(read_lines(side.lines)) for side in (second, first)]
    try:
        for ours, theirs in itertools.zip_longest(*sides, fillvalue={}):
            lines = [(ours[name], theirs[other]) for name, other in names]
            one, two = lines[0]
            if any(one[key] != two[key] for key in ("set", "key", "speaker", "reference_scored")):
                return f"{second.lines} does not hold the utterances of {first.lines}, in the same order"
            words.append(one["words"])
            speakers.append(numbers.setdefault(one["speaker"], len(numbers) - 1))
            for pair, counts, test in zip(lines, counted, tests, strict=True):
                for line, count in zip(pair, counts, strict=True):
                    count.append(line["errors"])
                if pair[0]["errors"] or pair[1]["errors"]:
                    test.add(segments(*(marks(edits_of(line)) for line in pair)))
    except FileNotFoundError as error:
        return f"{error.filename or 'utterances.jsonl'} is not there"
    except (KeyError, ValueError, TypeError, AttributeError):
        return f"{first.lines} and {second.lines} do not hold the same utterances, or one is damaged or of an older version"
    for number, side in enumerate((second, first)):
        for systems, counts in zip(names, counted, strict=True):
            if sum(counts[number]) != side.report.systems[systems[number]].errors:
                return f"{side.lines} is not of the same run as the report beside it"
    settings, errors, drawn_from = first.report.settings, np.array(counted), np.array(speakers)
    rows = errors.reshape(-1, len(words))
    drawn = resampled_rates(rows, np.array(words), drawn_from, settings.bootstrap, settings.seed)
    wers = errors.sum(2) / sum(words)
    found = zip(names, wers.tolist(), drawn[::2], drawn[1::2], tests, strict=True)
    pairs = [
        compared(f"{second.letter} {name}", f"{first.letter} {other}", wer[0] - wer[1], mine - theirs, test)
        for (name, other), wer, mine, theirs, test in found
    ]
    blocks, number, _ = blocks_of(drawn_from)
    basis = f"{settings.bootstrap:,} resamples of {number:,} {blocks}"
    return pairs, basis if settings.bootstrap else "no resamples (bootstrap=0)"
