from __future__ import annotations

import json
import lzma
import math
import random

import numpy as np
import pytest

from asr_kd.evaluation.significance import MatchedPairs, interval, marks, resampled_errors, segments, two_sided
from asr_kd.evaluation.wer import align
from tests.evaluation.nist import FILE, SET, Triple, find, sc_stats, sclite, triples


def matched_pairs(transcripts: list[Triple]) -> dict[str, float | int]:
    pairs = MatchedPairs()
    for reference, first, second in transcripts:
        pairs.add(segments(marks(align(reference, first)), marks(align(reference, second))))
    return pairs.test()


def assert_same(found: dict[str, float | int], nist: list[float]) -> None:
    assert found.segments == nist[0]
    assert (found.mean, found.z) == pytest.approx(nist[1:3], abs=0.00051)
    in_table = math.floor(100 * abs(found.z)) / 100  # sc_stats looks p up for z cut to two digits
    assert nist[3] == pytest.approx(math.erfc(in_table / math.sqrt(2)), abs=0.001)
    assert found.p == pytest.approx(nist[3], abs=0.0085)


def test_the_same_as_sc_stats() -> None:
    """30 sets of 100 transcripts, each with the systems in both orders."""
    transcripts, kept = triples(), json.loads(lzma.decompress(FILE.read_bytes()))["mapsswe"]
    for index, (nist, turned) in enumerate(kept):
        some = transcripts[SET * index : SET * (index + 1)]
        assert_same(matched_pairs(some), nist)
        assert_same(matched_pairs([(a, c, b) for a, b, c in some]), turned)


@pytest.mark.skipif(find("sc_stats") is None, reason="SCTK (Debian package sctk) is not installed")
def test_the_same_as_sc_stats_that_is_installed() -> None:
    some = triples()[500:600]
    assert_same(matched_pairs(some), sc_stats(sclite(some)[0]))


@pytest.mark.parametrize(
    ("reference", "first", "second", "wanted"),
    [
        ("a b c d", "a b c d", "a b c d", []),
        ("a b c d", "x b c d", "a b c x", [(1, 0), (0, 1)]),
        ("a b c d", "x b d", "a b c x", [(2, 1)]),  # one word apart
        ("a b c", "x b c y", "x b c", [(1, 1), (1, 0)]),
        ("a b c", "a b c", "a b c y y", [(0, 2)]),
        ("a b c d e", "x b y c d e", "a b c d e", [(2, 0)]),  # the insertion parts b from c
        ("", "a", "", [(1, 0)]),
        ("", "", "", []),
    ],
)
def test_segments(reference: str, first: str, second: str, wanted: list[tuple[int, int]]) -> None:
    assert segments(marks(align(reference, first)), marks(align(reference, second))) == wanted


def test_by_hand() -> None:
    pairs = MatchedPairs()
    pairs.add([(1, 0), (2, 0), (0, 1), (1, 0)])
    # mean 3/4, variance (1 + 4 + 1 + 1 - 4 * 9/16) / 3 = 1.583, z = 0.75 / sqrt(1.583 / 4)
    assert pairs.test().model_dump() == pytest.approx({"segments": 4, "mean": 0.75, "z": 1.1921, "p": 0.2332}, abs=1e-4)


def test_nothing_to_test() -> None:
    pairs = MatchedPairs()
    assert pairs.test().model_dump() == {"segments": 0, "mean": 0.0, "z": 0.0, "p": 1.0}
    pairs.add([(1, 0), (1, 0)])
    assert pairs.test().model_dump() == {"segments": 2, "mean": 1.0, "z": 0.0, "p": 1.0}


def test_equal_systems_are_told_apart_about_as_often_as_p_says() -> None:
    rng, found = random.Random(0), 0
    for _ in range(400):
        pairs = MatchedPairs()
        pairs.add([(rng.randint(0, 3), rng.randint(0, 3)) for _ in range(60)])
        found += pairs.test().p < 0.05
    assert 8 <= found <= 34


def test_the_same_seed_draws_the_same() -> None:
    errors, words = np.array([[1, 0, 3], [0, 2, 1]]), np.array([4, 5, 6])
    one, two, other = (resampled_errors(errors, words, 50, seed) for seed in (3, 3, 4))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    assert not np.array_equal(one[0], other[0])


def test_systems_share_their_draws() -> None:
    errors = np.array([[1, 0, 3, 2], [2, 0, 6, 4]])
    drawn, words = resampled_errors(errors, np.full(4, 7), 100, 0)
    assert np.array_equal(drawn[1], 2 * drawn[0])
    assert (words == 28).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    truth, hits, trials = 0.2, 0, 200
    for trial in range(trials):
        words = rng.integers(3, 8, 60)
        errors = rng.binomial(words, truth)
        drawn, total = resampled_errors(errors[None], words, 200, trial)
        bounds = interval(drawn[0] / total)
        assert bounds is not None
        hits += bounds[0] <= truth <= bounds[1]
    assert 0.88 <= hits / trials <= 0.99


@pytest.mark.parametrize("values", [[], [0.1, np.nan], [0.1, np.inf]])
def test_no_interval_where_a_value_is_undefined(values: list[float]) -> None:
    assert interval(values) is None


def test_two_sided_p() -> None:
    assert two_sided(np.array([-0.2, -0.1, -0.1, 0.1])) == 2 * 2 / 5
    assert two_sided(np.array([0.1] * 99)) == 2 / 100
    assert two_sided(np.zeros(10)) == 1
    assert two_sided(np.array([])) is None
    assert two_sided(np.array([0.1, np.nan])) is None
