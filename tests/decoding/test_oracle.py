"""Our beam search against torchaudio's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asr_kd.decoding.decoder import Decoder
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.decoding.words import Word
from asr_kd.units import Units
from tests.decoding.oracle import TorchaudioDecoder, align_spikes

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
    theirs = TorchaudioDecoder(DecodingSettings(decoder="beam", **values), letter_units, 0.03)
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
    for kind in (Decoder, TorchaudioDecoder):
        settings = DecodingSettings(decoder="beam", beam=20, lm=digits_arpa, lexicon=digits_lexicon)
        decoder = kind(settings, digit_units, 0.03)
        found.append(
            [decoder(spoken(digit_units, text, seed))[0] for seed, text in enumerate(("zero three", "one", ""))]
        )
    assert [one.text for one in found[0]] == [other.text for other in found[1]] == ["zero three", "one", ""]
    for one, other in zip(*found, strict=True):
        for ours, theirs in zip(one.words, other.words, strict=True):
            assert times(ours) == times(theirs)


def test_alignment_of_certain_posteriors() -> None:
    path = [0, 1, 1, 0, 1, 2, 0]
    log_probs = np.log(np.eye(4, dtype=np.float32)[path] * 0.98 + 0.005)
    spikes = align_spikes(log_probs, [1, 1, 2], 0)
    assert [(spike.unit, spike.start, spike.end) for spike in spikes] == [(1, 1, 3), (1, 4, 5), (2, 5, 6)]
    assert align_spikes(log_probs, [], 0) == []
