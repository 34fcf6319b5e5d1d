from __future__ import annotations

import pytest

from asr_kd.evaluation.calibration import Calibration, Delays, TimedWord, timed_words
from asr_kd.evaluation.schema import Bin, Delay
from asr_kd.evaluation.wer import align
from asr_kd.text import basic, english


def words(*pairs: tuple[float, bool]) -> list[TimedWord]:
    return [TimedWord(0.0, confidence, 0 if right else None) for confidence, right in pairs]


def test_words_as_decoded_and_as_scored() -> None:
    times = [["One,", 0.0, 0.3, 0.9], ["well-known", 0.3, 0.8, 0.5], ["—", 0.8, 0.9, 0.2], ["tree", 0.9, 1.0, 0.1]]
    found = timed_words(times, align("one known three", "one well known tree"), basic)
    assert found == [
        TimedWord(0.3, 0.9, 0), TimedWord(0.8, 0.5, None), TimedWord(0.8, 0.5, 1), TimedWord(1.0, 0.1, None),
    ]  # fmt: skip


def test_words_that_normalising_joins_stand_for_none() -> None:
    times = [["twenty", 0.0, 0.3, 0.9], ["one", 0.3, 0.5, 0.9]]
    assert timed_words(times, align("21", "21"), english) is None
    assert timed_words([], align("a", ""), basic) == []


def test_figures_by_hand() -> None:
    calibration = Calibration()
    calibration.add(words((0.95, True), (0.95, True), (0.95, False), (0.45, True)))
    calibration.add(words((0.45, False)))
    figures = calibration.figures()
    assert figures is not None
    assert figures.words == 5
    assert figures.bins[9].model_dump() == {
        "low": 0.9,
        "high": 1.0,
        "words": 3,
        "confidence": pytest.approx(0.95),
        "accuracy": 2 / 3,
    }
    assert figures.bins[0] == Bin(low=0.0, high=0.1, words=0, confidence=None, accuracy=None)
    # 3 words 0.2833 apart, 2 words 0.05 apart
    assert figures.expected_error == pytest.approx((3 * (0.95 - 2 / 3) + 2 * 0.05) / 5)
    # bits: 2 * 0.0740 + 4.3219 + 1.1520 + 0.8625 = 6.4844; of the share of right words, 3 of 5: 4.8548
    assert figures.normalised_cross_entropy == pytest.approx((4.8548 - 6.4844) / 4.8548, abs=1e-4)


def test_confidences_that_know_every_error() -> None:
    calibration = Calibration()
    calibration.add(words((1.0, True), (0.0, False)))
    figures = calibration.figures()
    assert figures is not None
    assert figures.normalised_cross_entropy == pytest.approx(1, abs=1e-3)
    assert figures.expected_error == 0


def test_undefined() -> None:
    calibration = Calibration()
    assert calibration.figures() is None
    calibration.add(words((0.8, True)))
    figures = calibration.figures()
    assert figures is not None
    assert figures.normalised_cross_entropy is None
    assert Delays().figures() is None


def test_delays_of_words_that_both_got_right() -> None:
    delays = Delays()
    teacher = [TimedWord(0.5, 1, 0), TimedWord(0.9, 1, None), TimedWord(1.5, 1, 2), TimedWord(2.0, 1, 3)]
    delays.add([TimedWord(0.62, 1, 0), TimedWord(0.9, 1, 1), TimedWord(1.71, 1, 2), TimedWord(1.99, 1, 3)], teacher)
    assert delays.figures() == Delay(median=120, p90=210, words=3)
