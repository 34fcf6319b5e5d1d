from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asr_kd.decoding.decoder import Decoder
from asr_kd.decoding.kenlm import KenLm
from asr_kd.decoding.ngram import read_arpa
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.errors import UserError
from asr_kd.units import Units

needs_extra = pytest.mark.usefixtures("flashlight")


@needs_extra
def test_kenlm_reads_what_our_reader_reads(digits_arpa: str) -> None:
    words = ["zero", "one", "two", "three", "seven", "nine", "ten"]
    ours, theirs = read_arpa(digits_arpa), KenLm(digits_arpa, words)
    rng = np.random.default_rng(0)
    for _ in range(50):
        context, state = ours.start, theirs.start
        for word in rng.choice(words, rng.integers(0, 6)).tolist():
            one, context = ours.score(context, word)
            other, state = theirs.score(state, word)
            assert one == pytest.approx(other, abs=1e-4)
        assert ours.finish(context) == pytest.approx(theirs.finish(state), abs=1e-4)


@needs_extra
def test_kenlm_tells_which_words_it_knows(digits_arpa: str) -> None:
    words = ["zero", "ZERO", "one", "zehn"]
    assert [word for word in words if KenLm(digits_arpa, words).knows(word)] == ["zero", "one"]


@needs_extra
def test_a_damaged_kenlm_binary_is_named(digit_units: Units, digits_lexicon: str, tmp_path: Path) -> None:
    path = tmp_path / "lm.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(100))
    with pytest.raises(UserError, match=r"lm.bin: not a language model that KenLM reads"):
        Decoder(DecodingSettings(decoder="beam", lm=str(path), lexicon=digits_lexicon), digit_units, 0.03)


def test_without_the_extra_it_says_what_to_install(
    digit_units: Units, digits_lexicon: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchaudio.models.decoder._ctc_decoder", None)
    path = tmp_path / "lm.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    with pytest.raises(
        UserError,
        match=r"lm.bin: a KenLM binary needs (the extra lm; install|flashlight-text, which is not there for Python 3.13; give)",
    ):
        Decoder(DecodingSettings(decoder="beam", lm=str(path), lexicon=digits_lexicon), digit_units, 0.03)
    with pytest.raises(UserError, match=r"lm.bin: a KenLM binary does not tell its words; set lexicon"):
        Decoder(DecodingSettings(decoder="beam", lm=str(path)), digit_units, 0.03)
