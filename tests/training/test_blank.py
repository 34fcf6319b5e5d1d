from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from asr_kd.decoding.greedy import units_of
from asr_kd.evaluation.wer import count_errors
from asr_kd.training.blank import OFFSETS, BlankCurve
from asr_kd.units import Units


def said(units: Units, text: str, leads: list[float], gaps: list[float]) -> np.ndarray:
    """Posteriors of letters with blanks between them: by how much the blank leads at each letter, and at each gap."""
    first, *pieces = units.encode(text)  # the space before the word comes first
    rows = []
    for unit, lead, gap in zip([first, *pieces], [-9.0, *leads], [9.0, *gaps], strict=True):
        for best, ahead in ((unit, lead), (units.encode("b")[-1], gap)):
            row = np.full(units.size, -9.0)
            row[best], row[units.blank] = 0.0, ahead
            rows.append(row)
    return torch.from_numpy(np.stack(rows)).log_softmax(-1).numpy()


def test_every_point_counts_what_decoding_with_it_counts(units: Units) -> None:
    rng = np.random.default_rng(0)
    curve = BlankCurve()
    texts = ["ab ba", "b", "aab a b", ""]
    posteriors = [
        torch.from_numpy(rng.normal(0, 2, (frames, units.size))).log_softmax(-1).numpy() for frames in (40, 7, 90, 1)
    ]
    for text, log_probs in zip(texts, posteriors, strict=True):
        curve.add(text, log_probs, units)
    assert (curve.words, curve.frames) == (6, 138)
    for point, offset in enumerate(OFFSETS):
        errors, blanks = np.zeros(3, int), 0
        for text, log_probs in zip(texts, posteriors, strict=True):
            shifted = log_probs.copy()
            shifted[:, units.blank] -= offset
            counts = count_errors(text, units.decode(units_of(shifted.argmax(1))))
            errors += (counts.substitutions, counts.deletions, counts.insertions)
            blanks += (shifted.argmax(1) == units.blank).sum()
        assert curve.errors[point].tolist() == errors.tolist() and curve.blanks[point] == blanks
    assert len(np.unique(curve.errors, axis=0)) > 5, "the points differ"


def test_the_best_constant_is_found(units: Units) -> None:
    curve = BlankCurve()
    for number in range(20):
        # the blank leads by up to 1.2 where there is a letter, and by 2.3 at least where there is none
        curve.add("ab", said(units, "ab", [1.2, 0.06 * number], [2.3 + 0.1 * number, 2.5]), units)
    found = OFFSETS[curve.choose()]
    assert curve.errors[curve.choose()].sum() == 0 < curve.errors[list(OFFSETS).index(0.0)].sum()
    assert 1.2 < found < 2.3


def curve_of(deletions: list[int], insertions: list[int], substitutions: int = 0, words: int = 600) -> BlankCurve:
    """A curve with these counts at -1, 0, 1, … nat, and straight lines between them."""
    curve = BlankCurve()
    at = np.arange(-1, 5)
    curve.errors[:, 0] = substitutions
    for column, counts in ((1, deletions), (2, insertions)):
        curve.errors[:, column] = np.round(np.interp(OFFSETS, at, counts))
    curve.words = words
    return curve


def test_where_errors_are_as_few_deletions_and_insertions_are_balanced() -> None:
    # the sum is 70 from 0 to 2 nat: the middle has as many of each
    curve = curve_of([90, 60, 35, 10, 5, 0], [0, 10, 35, 60, 120, 300])
    assert OFFSETS[curve.choose()] == 1.0


def test_a_single_point_does_not_choose() -> None:
    curve = curve_of([130, 100, 60, 60, 60, 60], [0, 0, 30, 60, 90, 120], 100)
    lucky = list(OFFSETS).index(3.0)
    curve.errors[lucky, 0] -= 65  # by chance fewer errors than anywhere
    assert curve.errors.sum(1).argmin() == lucky and OFFSETS[curve.choose()] == 1.0


@pytest.mark.parametrize(("words", "offset"), [(600, 0.0), (670, 4.0)])
def test_where_no_point_finds_words_nothing_is_taken_off(words: int, offset: float) -> None:
    # with less blank it says something, which is as wrong; of 600 words next to none is right, of 670 some are
    curve = curve_of([600, 500, 400, 300, 200, 100], [0] * 6, words=words)
    curve.errors[:, 0] = 595 - curve.errors[:, 1]
    assert OFFSETS[curve.choose()] == offset


def test_of_equals_the_one_that_changes_least() -> None:
    assert OFFSETS[curve_of([0] * 6, [0] * 6).choose()] == 0.0
    assert OFFSETS[curve_of([20, 20, 0, 0, 0, 20], [0] * 6).choose()] == pytest.approx(1.5)


def test_one_point_is_no_calibration(units: Units) -> None:
    curve = BlankCurve(np.zeros(1))
    curve.add("ab", said(units, "ab", [1.0, 1.0], [2.0, 2.0]), units)
    assert curve.choose() == 0 and curve.errors.tolist() == [[0, 1, 0]]


def test_a_calibrated_network_is_found_calibrated(units: Units) -> None:
    """The constants lie on one grid, so that what was taken off once is not taken off again."""
    posteriors = [said(units, "ab", [1.2, 0.06 * number], [2.3 + 0.1 * number, 2.5]) for number in range(20)]
    first, second = BlankCurve(), BlankCurve()
    for log_probs in posteriors:
        first.add("ab", log_probs, units)
    offset = OFFSETS[first.choose()]
    for log_probs in posteriors:
        log_probs[:, units.blank] -= offset
        second.add("ab", log_probs, units)
    assert offset > 0 and OFFSETS[second.choose()] == 0.0
    assert all(before < after for before, after in pairwise(OFFSETS))
