"""The watch on the run's own average: it may vary, and it must not fall silent."""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import Any

import pytest

from asr_kd.distillation.guard import FIRST, Watch
from asr_kd.distillation.settings import SourceSettings


def test_it_closes_when_little_is_spoken_and_opens_again() -> None:
    watch = Watch()
    assert all(watch.allows(0.1 + 0.05 * (-1) ** number, 0.5) for number in range(FIRST))
    assert watch.first == watch.now == pytest.approx(0.1)
    assert all(watch.allows(0.08 + 0.05 * (-1) ** number, 0.5) for number in range(100))  # less, and it varies
    assert watch.left_out == 0
    said = [watch.allows(0.0, 0.5) for _ in range(30)]
    assert said[0] and not said[-1] and watch.left_out == said.count(False) > 10
    assert said == sorted(said, reverse=True)
    assert [watch.allows(0.1, 0.5) for _ in range(60)][-1]
    assert watch.first == pytest.approx(0.1)


def test_a_network_that_never_spoke_is_not_held_back() -> None:
    watch = Watch()
    assert all(watch.allows(0.0, 1.0) for _ in range(3 * FIRST))


def test_it_goes_on_from_where_it_was_saved() -> None:
    whole = Watch()
    said = [whole.allows(0.2 / (1 + number), 0.3) for number in range(60)]
    for stop in (1, FIRST - 1, FIRST, 45):
        one = Watch()
        before = [one.allows(0.2 / (1 + number), 0.3) for number in range(stop)]
        other = Watch(*json.loads(json.dumps(astuple(one))))
        assert before + [other.allows(0.2 / (1 + number), 0.3) for number in range(stop, 60)] == said
        assert other == whole


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"teacher": "folder", "guard": 0.5}, "guard watches teacher: average"),
        ({"targets": "folder", "guard": 0.5}, "guard watches teacher: average"),
        ({"teacher": ["cycle", "folder"]}, "teacher: cycle answers alone"),
    ],
)
def test_what_does_not_go_together(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSettings.model_validate({"audio": "memory", "soft": 1.0, **source})
