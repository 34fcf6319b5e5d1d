from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from asr_kd.decoding.estimate import write_arpa
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.texts import train_units
from asr_kd.units import Units

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def flashlight() -> None:
    """Only where torchaudio's CTC decoder and KenLM are there to compare with."""
    if importlib.util.find_spec("flashlight") is None:
        pytest.skip(
            "flashlight-text is not there for Python 3.13; these tests run on 3.11 and 3.12"
            if sys.version_info >= (3, 13)
            else "flashlight-text is not installed; `pip install -r requirements-dev.lock` does it"
        )


@pytest.fixture(scope="session")
def digit_units(tmp_path_factory: pytest.TempPathFactory) -> Units:
    """Some digits are one piece, some are spelled."""
    folder = tmp_path_factory.mktemp("units")
    (folder / "text.txt").write_text("\n".join(f"{one} {two}" for one in DIGITS for two in DIGITS[::2]) + "\n")
    return train_units(UnitsSettings(source=str(folder / "text.txt"), output=str(folder / "units"), size=24))


@pytest.fixture(scope="session")
def letter_units(tmp_path_factory: pytest.TempPathFactory) -> Units:
    """∅, <unk>, ▁, a, b: sequences of a few frames can all be enumerated."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "text.txt").write_text("a b ab ba\n" * 3)
    return train_units(
        UnitsSettings(source=str(folder / "text.txt"), output=str(folder / "units"), kind="char", size=9)
    )


@pytest.fixture(scope="session")
def digits_arpa(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lm") / "digits.arpa"
    sentences = [" ".join(words) for words in itertools.product(DIGITS[:4], DIGITS[2:6], DIGITS[5:7])]
    write_arpa(path, [*sentences, *DIGITS], 3)
    return str(path)


@pytest.fixture(scope="session")
def letters_arpa(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("lm") / "letters.arpa"
    write_arpa(path, ["a b", "ab a", "ab", "a ab b", "b"], 2)
    return str(path)


@pytest.fixture(scope="session")
def digits_lexicon(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lexicon") / "digits.txt"
    path.write_text("\n".join(DIGITS) + "\n")
    return str(path)
