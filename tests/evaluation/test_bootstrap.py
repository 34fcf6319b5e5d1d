from __future__ import annotations

import numpy as np
import pytest

from asr_kd.evaluation.bootstrap import interval, resampled_errors, two_sided


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
