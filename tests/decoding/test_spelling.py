from __future__ import annotations

import pytest

from asr_kd.decoding.spelling import Spelling
from asr_kd.units import learn_units


@pytest.mark.parametrize(
    ("learned", "written"),
    [
        ("DON'T GO NOW", "DON'T GO NO"),
        ("don't go now", "don't go no"),
        ("dont go now", "dont go no"),
        ("don't go now.", "don't go. no"),
        ("Don't go now. ", "Don't go. no"),
    ],
)
def test_case_apostrophes_and_marks_become_those_of_the_units(learned: str, written: str) -> None:
    spelling = Spelling(learn_units([learned], "char", 40), "basic")
    assert spelling(" Don't  go. — no! ") == written
    assert spelling.unwritable(written) == []


def test_what_the_units_cannot_write_stays_and_is_named() -> None:
    spelling = Spelling(learn_units(["go now"], "char", 40), "basic")
    assert spelling("Go 3 won") == "go 3 won" and spelling.unwritable("go 3 won") == ["3"]


def test_units_apply_their_own_normaliser() -> None:
    spelling = Spelling(learn_units(["don't go"], "char", 40, "basic"), "basic")
    assert spelling("Don't go!") == "dont go" and spelling.unwritable("dont go") == []


def test_without_units_a_normaliser_is_applied() -> None:
    assert Spelling(None, "basic")("Don't go, 3!") == "dont go 3"
    assert Spelling(None, "none")("Don't  go, 3!") == "Don't go, 3!"
    assert Spelling(None, "basic").unwritable("ж3") == []
