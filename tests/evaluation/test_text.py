from __future__ import annotations

import importlib.metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.evaluation.text import NORMALIZERS, basic, english, none


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Hello,   World! ", "hello world"),
        ("don't — DON’T", "dont dont"),
        ("well-known", "well known"),
        ("Grüße aus Köln", "grüße aus köln"),
        ("e\u0301te\u0301", "été"),
        ("हिन्दी।", "हिन्दी"),
        ("１２３", "123"),
        ("...", ""),
    ],
)
def test_basic(text: str, wanted: str) -> None:
    assert basic(text) == wanted


def test_none_joins_white_space_only() -> None:
    assert none(" A,  b\n") == "A, b"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't worry, we're HERE!", "do not worry we are here"),
        ("twenty-one colours", "21 colors"),
        ("Uh, Mr. Smith [coughs] (laughs) said hi", "mister smith said hi"),
        ("naïve café", "naive cafe"),
        ("one two three", "123"),
        ("...", ""),
        ("", ""),
        ("$5 and 10%", "$5 and 10%"),
    ],
)
def test_english(text: str, wanted: str) -> None:
    assert english(text) == wanted


def test_names_carry_a_version() -> None:
    names = {key: item.name for key, item in NORMALIZERS.items()}
    library = importlib.metadata.version("whisper-normalizer")
    assert names == {"none": "none-1", "basic": "basic-1", "english": f"english-1 (whisper-normalizer {library})"}


@given(st.text(st.characters(codec="ascii")))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert basic(basic(text)) == basic(text)
