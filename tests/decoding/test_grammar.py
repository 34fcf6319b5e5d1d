from __future__ import annotations

from pathlib import Path

import pytest

from asr_kd.decoding.grammar import Grammar, read_lexicon
from asr_kd.errors import UserError
from asr_kd.units import Units


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
        ("ab\nzoo\n", r"line 2: zoo: cannot be spelled \(has other characters\)"),
        ("ab ▁ a q\n", r"line 1: ab: cannot be spelled \(q is none of the units\)"),
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
