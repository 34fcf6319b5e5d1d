from __future__ import annotations

from pathlib import Path

import pytest

from asr_kd.decoding.estimate import write_arpa
from asr_kd.decoding.grammar import Grammar, compare_words, learn_spellings, read_lexicon
from asr_kd.decoding.ngram import read_arpa
from asr_kd.errors import UserError
from asr_kd.units import Units, learn_units


def test_a_byte_order_mark_is_no_letter(letter_units: Units, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(b"\xef\xbb\xbfab\nba\n")
    assert list(read_lexicon(str(tmp_path / "words.txt"), letter_units).words.values()) == ["ab", "ba"]


def test_words_are_spelled_as_given_or_as_the_units_do(letter_units: Units, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("ab\n\nAlpha ▁ a\nAlpha ▁ a a\n")
    lexicon = read_lexicon(str(path), letter_units)
    spelled = {tuple(letter_units.piece(unit) for unit in ids): word for ids, word in lexicon.words.items()}
    assert spelled == {("▁", "a", "b"): "ab", ("▁", "a"): "Alpha", ("▁", "a", "a"): "Alpha"}
    grammar = Grammar(letter_units, None, lexicon, 0.0, 0.0)
    assert grammar.spell(tuple(letter_units.encode("a"))) == "Alpha"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\nzoo\n", r"line 2: zoo: cannot be spelled \(no unit covers 'zoo'\)"),
        ("ab ▁ a q\n", r"line 1: ab: cannot be spelled \(q is not one of the units\)"),
        ("ab a b\n", r"line 1: ab: its first piece, and no other, must begin with ▁"),
        ("ab ▁ a ▁ b\n", r"line 1: ab: its first piece, and no other, must begin with ▁"),
        ("ab\nba ▁ a b\n", r"line 2: ba: spelled like ab"),
        ("\n", r"holds no words"),
    ],
)
def test_what_is_wrong_with_a_lexicon_is_said(letter_units: Units, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"words.txt: {message}"):
        read_lexicon(str(path), letter_units)
    with pytest.raises(UserError, match=r"missing.txt"):
        read_lexicon(str(tmp_path / "missing.txt"), letter_units)


def test_a_no_break_space_is_part_of_a_word(letter_units: Units, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a\u00a0b ▁ a b\n")
    assert list(read_lexicon(str(tmp_path / "words.txt"), letter_units).words.values()) == ["a\u00a0b"]


def compared(folder: Path, sentences: list[str], units: Units, lexicon: str = "") -> str:
    write_arpa(folder / "lm.arpa", sentences, 2)
    (folder / "words.txt").write_text(lexicon)
    known = read_lexicon(str(folder / "words.txt"), units) if lexicon else None
    lm = read_arpa(str(folder / "lm.arpa"))
    learn_spellings(lm, units, known)
    return compare_words("lm.arpa", lm, units, known)


def test_words_of_a_language_model_that_cannot_be_spelt_are_counted(letter_units: Units, tmp_path: Path) -> None:
    assert compared(tmp_path, ["ab a", "b"], letter_units) == ""
    assert compared(tmp_path, ["ab zoo", "Ab b"], letter_units) == (
        "lm.arpa: 2 of its 4 words cannot be spelt by the units (such as Ab, zoo); they are never found"
    )


def test_a_language_model_of_other_words_is_refused(letter_units: Units, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lm.arpa: none of its 2 words can be spelt by the units \(such as AB, BA\)"):
        compared(tmp_path, ["AB BA"], letter_units)


def test_a_language_model_is_compared_with_the_lexicon(letter_units: Units, tmp_path: Path) -> None:
    assert compared(tmp_path, ["ab a", "ZOO"], letter_units, "ab\na\n") == ""
    assert compared(tmp_path, ["ab a", "ZOO"], letter_units, "ab\nba\nbb\n") == (
        "lm.arpa: does not know 2 of the 3 words of the lexicon (such as ba, bb); they count as unknown"
    )
    with pytest.raises(UserError, match=r"lm.arpa: knows none of the 1 words of the lexicon \(such as bb\)"):
        compared(tmp_path, ["ab a"], letter_units, "bb\n")


@pytest.mark.parametrize("lexicon", ["", "don't\n", "don’t\n"])
def test_one_spelling_for_language_model_units_and_lexicon(tmp_path: Path, lexicon: str) -> None:
    units = learn_units(["don't do"] * 3, "char", 20)
    for word in ("don’t", "don't", "do\u00adn't"):
        assert compared(tmp_path, [f"{word} do", f"do {word}"], units, lexicon) == ""
        lm = read_arpa(str(tmp_path / "lm.arpa"))
        known = read_lexicon(str(tmp_path / "words.txt"), units) if lexicon else None
        learn_spellings(lm, units, known)
        said = lexicon.strip() or "don't"
        assert lm.score(("do",), said)[0] == lm.table["do", word][0]
        assert lm.score(*[lm.score((), said)[1], "do"])[0] == lm.table[word, "do"][0]


def test_units_that_fold_capitals_find_a_language_model_of_capitals(tmp_path: Path) -> None:
    units = learn_units(["ab ba"] * 3, "char", 20, "basic")
    assert compared(tmp_path, ["AB BA"], units) == ""
    lm = read_arpa(str(tmp_path / "lm.arpa"))
    learn_spellings(lm, units, None)
    assert lm.score((), "ab")[0] == lm.table[("AB",)][0]
