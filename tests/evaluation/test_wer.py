from __future__ import annotations

import json
import lzma
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from asr_kd.evaluation.wer import CELLS, ErrorCounts, align, character_errors, count_errors, edit_distance
from tests.evaluation.nist import FILE, find, sclite, triples

texts = st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join)


def fewest_edits(left: list[str], right: list[str]) -> int:
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


def letters(reference: str, hypothesis: str) -> str:
    """An alignment as sclite prints it, a letter a step."""
    return "".join({"equal": "C"}.get(edit.kind, edit.kind[0].upper()) for edit in align(reference, hypothesis))


@pytest.mark.parametrize("cells", [0, CELLS])
def test_step_by_step_as_sclite(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    """6,000 pairs: the same alignments, and so the same counts, both as short texts are aligned and as long ones."""
    monkeypatch.setattr("asr_kd.evaluation.wer.CELLS", cells)
    alignments = json.loads(lzma.decompress(FILE.read_bytes()))["alignments"]
    for (reference, *hypotheses), wanted in zip(triples(), alignments, strict=True):
        assert [letters(reference, hypothesis) for hypothesis in hypotheses] == wanted


@pytest.mark.skipif(find("sclite") is None, reason="SCTK (Debian package sctk) is not installed")
def test_as_sclite_that_is_installed() -> None:
    some = triples()[:600]
    for (reference, *hypotheses), wanted in zip(some, sclite(some)[1], strict=True):
        assert [letters(reference, hypothesis) for hypothesis in hypotheses] == wanted


def test_against_the_fewest_edits() -> None:
    """sclite's alignment is not always one of fewest edits: in 29 of these 6,000 pairs it has more errors."""
    more = 0
    alignments = json.loads(lzma.decompress(FILE.read_bytes()))["alignments"]
    for (reference, *hypotheses), steps in zip(triples(), alignments, strict=True):
        for hypothesis, letters_of in zip(hypotheses, steps, strict=True):
            fewest = edit_distance(reference, hypothesis)
            errors = len(letters_of) - letters_of.count("C")
            assert errors >= fewest
            more += errors > fewest
            if len(reference) < 500:
                assert fewest == Levenshtein.distance(reference.split(), hypothesis.split())
                assert character_errors(reference, hypothesis) == (
                    len(reference),
                    Levenshtein.distance(reference, hypothesis),
                )
    assert more == 29


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wanted"),
    [("abc", "abd", (3, 1)), ("a b", "ab", (3, 1)), ("", "a b", (0, 3)), ("a  b", "", (3, 3)), ("", "", (0, 0))],
)
def test_characters(reference: str, hypothesis: str, wanted: tuple[int, int]) -> None:
    assert character_errors(reference, hypothesis) == wanted


def test_a_misplaced_stretch_is_no_row_of_substitutions() -> None:
    """Five substitutions are five errors and cost 20; three deletions and three insertions are six and cost 18."""
    assert count_errors("a b c d e", "d e x y z") == ErrorCounts(5, 0, 3, 3)
    assert edit_distance("a b c d e", "d e x y z") == 5


@given(texts, texts)
def test_no_fewer_errors_than_the_edit_distance(reference: str, hypothesis: str) -> None:
    counts = count_errors(reference, hypothesis)
    fewest = fewest_edits(reference.split(), hypothesis.split())
    assert edit_distance(reference, hypothesis) == fewest
    assert fewest <= counts.errors <= 4 * fewest / 3  # that many substitutions cost 4 each, another error 3 or more
    assert counts.words == len(reference.split())
    assert counts.words - counts.deletions + counts.insertions == len(hypothesis.split())


def test_long_texts() -> None:
    words = random.Random(0).choices([f"w{index}" for index in range(500)], k=4000)
    counts = count_errors(" ".join(words), " ".join(words[:1000] + ["new"] * 7 + words[1010:]))
    assert counts == ErrorCounts(4000, 7, 3, 0)


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
    def rate(*pairs: tuple[str, str]) -> float:
        return sum((count_errors(*pair) for pair in pairs), ErrorCounts()).rate

    assert rate(("a", "b"), ("c c c", "c c c")) == 0.25
    assert rate(("", "a"), ("b b", "b b")) == 0.5
    assert rate() == rate(("", "")) == 0.0
    assert rate(("", "a")) == math.inf
