from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.evaluation.wer import ErrorCounts, align, count_errors, error_rate

texts = st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join)


def edit_distance(left: list[str], right: list[str]) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wanted"),
    [
        ("one two three", "one two three", (3, 0, 0, 0)),
        ("one two three four", "one five three", (4, 1, 1, 0)),
        ("one two", "one one two two", (2, 0, 0, 2)),
        ("one", "", (1, 0, 1, 0)),
        ("", "one two", (0, 0, 0, 2)),
        ("", "", (0, 0, 0, 0)),
        ("  one\ttwo \n", "one  two", (2, 0, 0, 0)),
    ],
)
def test_hand_counted(reference: str, hypothesis: str, wanted: tuple[int, int, int, int]) -> None:
    assert count_errors(reference, hypothesis) == ErrorCounts(*wanted)


@given(texts, texts)
def test_as_few_errors_as_the_edit_distance(reference: str, hypothesis: str) -> None:
    counts = count_errors(reference, hypothesis)
    assert counts.errors == edit_distance(reference.split(), hypothesis.split())
    assert counts.words == len(reference.split())
    assert counts.words - counts.deletions + counts.insertions == len(hypothesis.split())


@given(texts, texts)
def test_an_alignment_spells_both_texts(reference: str, hypothesis: str) -> None:
    edits = align(reference, hypothesis)
    assert [edit.reference for edit in edits if edit.reference is not None] == reference.split()
    assert [edit.hypothesis for edit in edits if edit.hypothesis is not None] == hypothesis.split()
    for edit in edits:
        assert (edit.kind == "equal") == (edit.reference == edit.hypothesis)
        assert (edit.kind == "deletion") == (edit.hypothesis is None)
        assert (edit.kind == "insertion") == (edit.reference is None)


def test_a_rate_is_all_errors_by_all_words() -> None:
    assert error_rate([("a", "b"), ("c c c", "c c c")]) == 0.25
    assert error_rate([("", "a"), ("b b", "b b")]) == 0.5
    assert error_rate([]) == 0.0
    assert error_rate([("", "")]) == 0.0
    assert error_rate([("", "a")]) == math.inf
