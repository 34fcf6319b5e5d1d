from __future__ import annotations

import numpy as np
import pytest

from asr_kd.decoding.greedy import units_of


def path(*units: int, size: int = 4) -> np.ndarray:
    """Log-probabilities whose best path is `units`."""
    return np.log(np.eye(size)[list(units)] * 0.9 + 0.1 / size).reshape(len(units), size)


@pytest.mark.parametrize(
    ("units", "wanted"),
    [
        ((), []),
        ((0, 0), []),
        ((1, 1, 1), [1]),
        ((1, 0, 1), [1, 1]),
        ((0, 1, 1, 2, 0, 0, 2, 3), [1, 2, 2, 3]),
    ],
)
def test_joins_repeats_and_drops_blanks(units: tuple[int, ...], wanted: list[int]) -> None:
    assert units_of(path(*units).argmax(1)) == wanted


def test_another_blank() -> None:
    assert units_of(path(3, 0, 0, 3, 0).argmax(1), blank=3) == [0, 0]
