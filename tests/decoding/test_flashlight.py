from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from asr_kd.config import DecodingSettings
from asr_kd.decoding.decoder import Decoder
from asr_kd.decoding.flashlight import KenLm
from asr_kd.decoding.ngram import read_arpa
from asr_kd.decoding.words import Word
from asr_kd.errors import UserError
from asr_kd.units import Units

needs_extra = pytest.mark.usefixtures("flashlight")


def spoken(units: Units, text: str, seed: int, sharpness: float = 5.0) -> np.ndarray:
    """Log-probabilities of someone who says `text` not quite clearly: float32 [frames, units]."""
    rng = np.random.default_rng(seed)
    path = [0]
    for unit in units.encode(text):
        path += [unit] * int(rng.integers(1, 3)) + [0] * int(rng.integers(1, 4))
    logits = rng.normal(0, 1.0, (len(path), units.size))
    logits[np.arange(len(path)), path] += rng.normal(sharpness, 2.0, len(path))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def times(word: Word) -> list[tuple[str, float, float]]:
    return [(token.piece, token.start, token.end) for token in word.tokens]


@needs_extra
@pytest.mark.parametrize(
    ("with_lm", "with_lexicon", "lm_weight", "word_bonus"),
    [
        (False, False, 0.5, 0.0), (False, True, 0.5, 1.0), (True, False, 1.0, 0.0), (True, False, 0.3, -1.0),
        (True, True, 1.0, 0.0), (True, True, 0.0, 0.0), (True, True, 2.0, 1.5),
    ],
)  # fmt: skip
def test_finds_what_ours_finds(
    letter_units: Units, letters_arpa: str, tmp_path: Path,
    with_lm: bool, with_lexicon: bool, lm_weight: float, word_bonus: float,
) -> None:  # fmt: skip
    (tmp_path / "words.txt").write_text("a\nab\nb\nabba\n")
    values = {
        "beam": 500, "nbest": 5, "lm": letters_arpa if with_lm else None, "lm_weight": lm_weight, "word_bonus": word_bonus,
        "lexicon": str(tmp_path / "words.txt") if with_lexicon else None,
    }  # fmt: skip
    if not with_lm:
        del values["lm_weight"]
    if not (with_lm or with_lexicon):
        del values["word_bonus"]
    ours = Decoder(DecodingSettings(decoder="beam", **values), letter_units, 0.03)
    theirs = Decoder(DecodingSettings(decoder="torchaudio", **values), letter_units, 0.03)
    rng = np.random.default_rng(1)
    for frames in range(1, 7):  # few enough that neither beam leaves anything out
        logits = rng.normal(0, 2, (frames, letter_units.size))
        log_probs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
        one, other = ours(log_probs), theirs(log_probs)
        assert [found.text for found in one] == [found.text for found in other]
        assert [found.score for found in one] == pytest.approx([found.score for found in other], abs=1e-3)
        for found, theirs_found in zip(one, other, strict=True):
            assert [times(word) for word in found.words] == [times(word) for word in theirs_found.words]


@needs_extra
def test_says_the_same_words_at_the_same_time(digit_units: Units, digits_arpa: str, digits_lexicon: str) -> None:
    found = []
    for engine in ("beam", "torchaudio"):
        settings = DecodingSettings(decoder=engine, beam=20, lm=digits_arpa, lexicon=digits_lexicon)
        decoder = Decoder(settings, digit_units, 0.03)
        found.append(
            [decoder(spoken(digit_units, text, seed))[0] for seed, text in enumerate(("zero three", "one", ""))]
        )
    assert [one.text for one in found[0]] == [other.text for other in found[1]] == ["zero three", "one", ""]
    for one, other in zip(*found, strict=True):
        for ours, theirs in zip(one.words, other.words, strict=True):
            assert times(ours) == times(theirs)


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
def test_is_sent_to_other_processes_as_its_settings(digit_units: Units, digits_lexicon: str) -> None:
    decoder = Decoder(DecodingSettings(decoder="torchaudio", lexicon=digits_lexicon), digit_units, 0.03)
    log_probs = spoken(digit_units, "four two", 3)
    assert pickle.loads(pickle.dumps(decoder))(log_probs) == decoder(log_probs)


@needs_extra
def test_no_frames(digit_units: Units) -> None:
    decoder = Decoder(DecodingSettings(decoder="torchaudio"), digit_units, 0.03)
    assert decoder(np.zeros((0, digit_units.size), np.float32))[0].text == ""


@needs_extra
def test_a_damaged_kenlm_binary_is_named(digit_units: Units, digits_lexicon: str, tmp_path: Path) -> None:
    path = tmp_path / "lm.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(100))
    with pytest.raises(UserError, match=r"lm.bin: not a language model that KenLM reads"):
        Decoder(DecodingSettings(decoder="beam", lm=str(path), lexicon=digits_lexicon), digit_units, 0.03)


@pytest.mark.parametrize("has_wheel", [True, False])
def test_without_the_extra_it_says_what_to_do(
    has_wheel: bool, digit_units: Units, digits_lexicon: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio.models.decoder._ctc_decoder", None)
    monkeypatch.setattr("asr_kd.decoding.flashlight.HAS_WHEEL", has_wheel)
    extra, missing = r"the extra lm; .*asr-kd\[lm\]", "flashlight-text, which is not there for Python 3.13; "
    with pytest.raises(UserError, match=rf"torchaudio needs {extra if has_wheel else missing + 'set decoder to beam'}"):
        Decoder(DecodingSettings(decoder="torchaudio"), digit_units, 0.03)
    path = tmp_path / "lm.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    with pytest.raises(
        UserError, match=rf"KenLM binary needs {extra if has_wheel else missing + 'give the ARPA file'}"
    ):
        Decoder(DecodingSettings(decoder="beam", lm=str(path), lexicon=digits_lexicon), digit_units, 0.03)
    with pytest.raises(UserError, match=r"lm.bin: a KenLM binary does not tell its words; set lexicon"):
        Decoder(DecodingSettings(decoder="beam", lm=str(path)), digit_units, 0.03)
