from __future__ import annotations

from typing import Any

import numpy as np

from asr_kd.evaluation.slices import DISTINCT, FIELDS, OTHERS, VALUES, Fields, Slicing


def sliced(values: list[Any], seconds: float = 2.0, name: str = "x") -> tuple[dict[str, Slicing], dict[str, str]]:
    fields = Fields()
    for value in values:
        given = {} if value is ... else {name: value}
        fields.add({"fields": given, "set": "test", "speaker": None, "seconds": seconds, "words": 4})
    return {one.field: one for one in fields.slicings(np.full(len(values), 4))}, fields.left_out


def test_text_and_absent_values() -> None:
    found, left_out = sliced(["clean", "noisy", ..., "clean", None])
    assert (found["x"].names, found["x"].labels.tolist()) == (["clean", "noisy", None], [0, 1, 2, 0, 2])
    assert (list(found), left_out) == (["x"], {})  # set, speaker, seconds and words_per_second part nothing


def test_a_field_that_comes_late() -> None:
    found, _ = sliced([..., ..., "a", True])
    assert (found["x"].names, found["x"].labels.tolist()) == (["a", "true", None], [2, 2, 0, 1])


def test_few_numbers_are_categories_in_order() -> None:
    found, _ = sliced([10, 9.5, 10, -1])
    assert (found["x"].names, found["x"].labels.tolist()) == (["-1", "9.5", "10"], [2, 1, 2, 0])
    assert not found["x"].bands


def test_many_numbers_are_cut_at_quintiles() -> None:
    found, _ = sliced([float(value) for value in range(100)] + [...])
    assert found["x"].bands
    assert found["x"].names == ["below 20", "20 to 40", "40 to 59", "59 to 79", "79 and more", None]
    assert np.bincount(found["x"].labels).tolist() == [20, 20, 19, 20, 21, 1]


def test_fixed_bands() -> None:
    found, _ = sliced([0.5 * value for value in range(20)], name="snr_db")
    assert found["snr_db"].names == ["0 to 5", "5 to 10"]
    fields = Fields()
    for seconds in np.linspace(0.5, 30, 60):
        fields.add({"fields": {}, "set": "test", "speaker": None, "seconds": float(seconds), "words": 6})
    names = {one.field: one.names for one in fields.slicings(np.full(60, 6))}
    assert names["seconds"] == ["below 1", "1 to 2", "2 to 5", "5 to 10", "10 to 20", "20 and more"]
    assert names["words_per_second"][0] == "below 1"


def test_many_values_are_taken_together_and_names_left_out() -> None:
    found, _ = sliced([f"s{index % 100}" for index in range(1000)] + ["s7"] * 5)
    assert len(found["x"].names) == VALUES + 1
    assert found["x"].names[-1] == OTHERS
    assert "s7" in found["x"].names
    _, left_out = sliced([f"file{index}" for index in range(500)])
    assert left_out == {"x": "a value of its own for most utterances"}
    _, left_out = sliced([f"file{index // 2}" for index in range(2 * DISTINCT + 10)])
    assert left_out == {"x": "more than 2,000 values"}


def test_many_fields_are_bounded() -> None:
    fields = Fields()
    given = {f"f{index:03}": "a" for index in range(100)}
    fields.add({"fields": given, "set": "test", "speaker": "s", "seconds": 1.0, "words": 1})
    assert len(fields.columns) == FIELDS
    assert len(fields.left_out) == 104 - FIELDS


def test_infinite_and_empty_values() -> None:
    found, _ = sliced(["", "a", float("nan"), "b", 10**400, float("inf")])
    assert (found["x"].names, found["x"].labels.tolist()) == (["a", "b", None], [2, 0, 2, 1, 2, 2])
