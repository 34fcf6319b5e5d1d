from __future__ import annotations

import math
from pathlib import Path

import pytest

from asr_kd.decoding.estimate import estimate
from asr_kd.decoding.ngram import read_arpa
from asr_kd.decoding.settings import LmSettings
from asr_kd.errors import UserError
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.texts import train_units


def test_words_and_model_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("b a\n\nb a\nb c\n")
    settings = LmSettings(source=str(tmp_path / "text.txt"), output=str(tmp_path / "out"))
    estimate(settings)
    assert (tmp_path / "out" / "words.txt").read_text() == "a\nb\nc\n"
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 3 words and their 2-grams from 3 utterances\n"
    model = read_arpa(str(tmp_path / "out" / "lm.arpa"))
    score, context = model.score(model.start, "b")
    # three of three sentences begin with it; Witten and Bell keep a share of 1 in 4 for others: 3 of 9 words, of 5 kinds
    lower = (3 + 4 / 5) / (9 + 4)
    assert score == pytest.approx(math.log10((3 + lower) / 4), abs=1e-4)
    assert model.score(context, "a")[0] > model.score(context, "c")[0] > model.score(context, "b")[0]
    before = (tmp_path / "out" / "lm.arpa").read_bytes()
    estimate(settings)  # again: the same
    assert (tmp_path / "out" / "lm.arpa").read_bytes() == before


def test_words_are_written_as_the_units_write_them(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("don’t stop\n" * 3)
    text = str(tmp_path / "text.txt")
    train_units(UnitsSettings(source=text, output=str(tmp_path / "units"), kind="char", size=20))
    estimate(LmSettings(source=text, output=str(tmp_path / "out"), units=str(tmp_path / "units")))
    assert (tmp_path / "out" / "words.txt").read_text() == "don't\nstop\n"


def test_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"text\.txt: holds no text"):
        estimate(LmSettings(source=str(tmp_path / "text.txt"), output=str(tmp_path / "out")))


def test_words_that_no_beam_search_would_find_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, units = tmp_path / "text.txt", str(tmp_path / "units")
    path.write_text("stop the\n" * 3)
    train_units(UnitsSettings(source=str(path), output=units, kind="char", size=20))
    path.write_text("stop THE\n")
    estimate(LmSettings(source=str(path), output=str(tmp_path / "out"), units=units))
    assert "text.txt: 1 of its 2 words cannot be spelt by the units (such as THE)" in capsys.readouterr().err
    for text, message in [
        ("STOP THE", "none of its 2 words can be spelt"),
        ("<s> stop", "a text holds <s>, which language"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=rf"text\.txt: {message}"):
            estimate(LmSettings(source=str(path), output=str(tmp_path / "other"), units=units))
    assert not (tmp_path / "other").exists()
