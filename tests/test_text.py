from __future__ import annotations

import importlib.metadata
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.text import NORMALIZERS, SPACES, Folding, basic, english, fold, none


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


def test_none_joins_white_space_and_folds() -> None:
    assert none(" A,  b\n") == "A, b"
    assert none("Cafe\u0301  so\u00adlo") == "Café solo"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("don’t o’clock ’tis dogs’ мʼята", "don't o'clock 'tis dogs' м'ята"),
        ("o‘clock o´clock o`clock o′clock", "o'clock o'clock o'clock o'clock"),
        ("‘so’ `so` 5´", "‘so' `so` 5´"),
        ("e\u0301te\u0301 Vie\u0323\u0302t", "été Việt"),
        ("e\u200d\u0301", "é"),
        ("می\u200cخواهم", "میخواهم"),
        ("co\u00adop\u2060er\u200eate\ufeff", "cooperate"),
        ("a\u200bb", "a b"),  # the zero-width space does part words
        ("a▁b▅c\0d", "a b c d"),
        ("As it, stands: – “yes” ½", "As it, stands: – “yes” ½"),
    ],
)
def test_folding_makes_one_spelling_and_leaves_the_rest(text: str, wanted: str) -> None:
    assert fold(text) == wanted == fold(wanted)


def test_folding_leaves_what_is_one_s_own() -> None:
    assert Folding("’")("don't don’t donʼt") == "don’t don’t don’t"
    assert Folding("'’")("don't don’t donʼt") == "don't don’t don't"
    assert Folding("\u00ad")("a\u00adb\u200db") == "a\u00adbb"


@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_every_normaliser_folds(name: str) -> None:
    apply = NORMALIZERS[name].apply
    for curly, straight in (("we don’t know", "we don't know"), ("it’s five o‘clock", "it's five o'clock")):
        assert apply(curly) == apply(straight)
    assert apply("zwei\u00admal ze\u200dro") == apply("zweimal zero")
    assert len(apply("zwei\u00admal").split()) == 1


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
        ("we don’t, it’s, he’ll", "we do not it is he will"),
    ],
)
def test_english(text: str, wanted: str) -> None:
    assert english(text) == wanted


def test_names_carry_a_version() -> None:
    names = {key: item.name for key, item in NORMALIZERS.items()}
    library = importlib.metadata.version("whisper-normalizer")
    assert names == {"none": "none-3", "basic": "basic-2", "english": f"english-3 (whisper-normalizer {library})"}


@given(st.text(st.characters(codec="ascii")))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert basic(basic(text)) == basic(text)


@settings(deadline=None)
@given(st.text())
def test_folding_twice_changes_nothing_and_parts_no_word(text: str) -> None:
    folded = fold(text)
    assert fold(folded) == folded == unicodedata.normalize("NFC", folded)
    if not set(SPACES) & set(text):
        assert len(folded.split()) <= len(text.split())


@pytest.mark.parametrize("name", list(NORMALIZERS))
@pytest.mark.parametrize("separator", SPACES)
def test_what_separates_words_does_for_every_normaliser(name: str, separator: str) -> None:
    apply = NORMALIZERS[name].apply
    assert apply(f"ab{separator}cd") == "ab cd"


@pytest.mark.parametrize("name", list(NORMALIZERS))
@settings(deadline=None)
@given(
    letters=st.text("aébдम", min_size=1),
    joiner=st.sampled_from("\u00ad\u200c\u200d\u2060\ufeff\u200e"),
    at=st.integers(0, 8),
)
def test_a_joiner_is_no_space_to_any_normaliser(name: str, letters: str, joiner: str, at: int) -> None:
    apply = NORMALIZERS[name].apply
    assert apply(letters[:at] + joiner + letters[at:]) == apply(letters)
