from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from asr_kd.errors import UserError
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.texts import check_texts
from asr_kd.shards.tarset import Sample, read_index, write_index, write_shard
from asr_kd.units import Units, learn_units


def checked(folder: Path, texts: list[str], units: Units, **changes: Any) -> None:
    (folder / "test").mkdir(exist_ok=True)
    samples = [Sample(f"u{number}", b"", "wav", {"text": text, "seconds": 1.0}) for number, text in enumerate(texts)]
    empty = write_shard(folder / "test" / "shard-000000.tar", [])
    write_index(folder / "test", [empty, write_shard(folder / "test" / "shard-000001.tar", samples)])
    values = {"systems": {"one": "x", "two": "y"}, "audio": str(folder / "test"), "output": "z"}
    settings = EvalSettings.model_validate(values | changes)
    systems = [SimpleNamespace(name=name, checkpoint=SimpleNamespace(units=units)) for name in settings.systems]
    sets = {name: (audio, read_index(audio)) for name, audio in settings.sets.items()}
    check_texts(settings, cast("Any", systems), sets)


@pytest.fixture(scope="module")
def units() -> Units:
    return learn_units(["don't say two"] * 3, "char", 30)


@pytest.mark.parametrize("normalizer", ["none", "basic", "english"])
def test_texts_of_other_letters_are_refused(units: Units, tmp_path: Path, normalizer: str) -> None:
    message = r"test: 2 of the 2 texts of shard-000001.tar \(first: u0\) hold characters that one cannot write: "
    with pytest.raises(UserError, match=message + ".*'д'"):
        checked(tmp_path, ["два", "да"], units, normalizer=normalizer)


def test_capitals_count_where_nothing_is_normalised(
    units: Units, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["SAY TWO", "DON’T"]
    with pytest.raises(UserError, match=r"cannot write: 'O', 'T'.*; set normalizer=basic"):
        checked(tmp_path, texts, units, normalizer="none")
    for name in ("basic", "english"):
        checked(tmp_path, texts, units, normalizer=name)
    checked(tmp_path, ["don’t sa\u00ady two"], units, normalizer="none")
    assert capsys.readouterr().err == ""


def test_some_are_counted_once(units: Units, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked(tmp_path, ["say 2", "say two", "say three"], units)
    assert capsys.readouterr().err == (
        f"{tmp_path}/test: 2 of the 3 texts of shard-000001.tar (first: u0) hold characters that one cannot write: "
        "'2', 'e', 'h', 'r'; their words count as errors\n"
    )
    checked(tmp_path, ["say 2", "say two"], units, normalizer="english")  # which writes two as 2
    assert capsys.readouterr().err == ""


def test_a_lexicon_has_letters_of_its_own(units: Units, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("два ▁ t w o\n")
    checked(tmp_path, ["два"], units, decoder="beam", lexicon=str(tmp_path / "words.txt"))
