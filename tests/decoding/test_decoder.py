from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from asr_kd.config.load import build
from asr_kd.decoding.decoder import Decoder, make_decoder
from asr_kd.decoding.estimate import write_arpa
from asr_kd.decoding.listening import Listener
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.errors import UserError
from asr_kd.units import Units


def said(units: Units, text: str, frames: int = 2, certainty: float = 0.9) -> np.ndarray:
    """Log-probabilities float32 [frames, units] of a text, each unit so many frames and a blank behind it."""
    path = [0]
    for unit in units.encode(text):
        path += [unit] * frames + [0]
    other = (1 - certainty) / (units.size - 1)
    return np.log(np.eye(units.size)[path] * (certainty - other) + other).astype(np.float32)


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_output_that_is_no_number_is_not_silence(letter_units: Units, decoder: Any) -> None:
    log_probs = said(letter_units, "ab")
    log_probs[3] = np.nan
    decode = Decoder(DecodingSettings(decoder=decoder), letter_units, 0.03)
    listener = Listener(SimpleNamespace(push=lambda log_probs: log_probs), decode, "a")  # type: ignore[arg-type]
    for hear in (decode, listener.push):
        with pytest.raises(UserError, match="the network's output is NaN; its weights are broken"):
            hear(log_probs)


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_words_with_times_and_confidences(letter_units: Units, decoder: Any) -> None:
    best = Decoder(DecodingSettings(decoder=decoder), letter_units, 0.03)(said(letter_units, "ab a"))[0]
    assert best.text == "ab a"
    # blank, ▁ ▁, blank, a a, blank, b b, blank, ▁ ▁, blank, a a, blank
    assert [(word.text, word.start, word.end) for word in best.words] == [
        ("ab", pytest.approx(0.03), pytest.approx(0.27)), ("a", pytest.approx(0.30), pytest.approx(0.45)),
    ]  # fmt: skip
    assert [(token.piece, round(token.start, 9), round(token.end, 9)) for word in best.words for token in word.tokens] == [
        ("▁", 0.03, 0.09), ("a", 0.12, 0.18), ("b", 0.21, 0.27), ("▁", 0.30, 0.36), ("a", 0.39, 0.45),
    ]  # fmt: skip
    assert [word.confidence for word in best.words] == pytest.approx([0.9**3, 0.9**2])


def test_nbest_texts_differ_and_fall_in_score(letter_units: Units) -> None:
    log_probs = said(letter_units, "ab", certainty=0.6)
    found = Decoder(DecodingSettings(decoder="beam", beam=20, nbest=4), letter_units, 0.03)(log_probs)
    assert len(found) == 4
    assert found[0].text == "ab"
    assert len({one.text for one in found}) == 4
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True)
    assert Decoder(DecodingSettings(decoder="beam", beam=20), letter_units, 0.03)(log_probs) == found[:1]


def test_can_be_sent_to_another_process(letter_units: Units, letters_arpa: str) -> None:
    decoder = Decoder(DecodingSettings(decoder="beam", lm=letters_arpa), letter_units, 0.03)
    log_probs = said(letter_units, "ba ab")
    assert pickle.loads(pickle.dumps(decoder))(log_probs) == decoder(log_probs)


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_nothing_heard(letter_units: Units, decoder: Any) -> None:
    found = Decoder(DecodingSettings(decoder=decoder), letter_units, 0.03)(np.zeros((0, letter_units.size), np.float32))
    assert [(one.text, one.words) for one in found] == [("", [])]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lm": "x.arpa"}, "lm needs a beam search; set decoder to beam"),
        ({"decoder": "torchaudio"}, "torchaudio's beam search is not among the decoders any more; set beam"),
        ({"lexicon": "x.txt"}, "lexicon needs a beam search"),
        ({"nbest": 3}, "nbest needs a beam search"),
        ({"decoder": "beam", "lm_weight": 2.0}, "lm_weight needs a language model; set lm"),
        ({"decoder": "beam", "word_bonus": 2.0}, "word_bonus needs a language model or a lexicon"),
        ({"decoder": "beam", "beam": 4, "nbest": 5}, "nbest 5 must not be above beam 4"),
        ({"decoder": "beam", "lm_weight": -1.0, "lm": "x"}, "lm_weight: input should be greater"),
    ],
)
def test_settings_that_do_not_fit_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(DecodingSettings, values, "command line")


def test_what_does_not_fit_is_said_once(
    letter_units: Units, letters_arpa: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(lm: str) -> Decoder:
        settings = DecodingSettings(decoder="beam", lm=lm)
        return make_decoder(settings, cast("Any", SimpleNamespace(units=letter_units, frame_ms=30, offset_ms=0)))

    write_arpa(tmp_path / "lm.arpa", ["ab zoo"], 2)
    for _ in range(2):
        made(str(tmp_path / "lm.arpa"))
    made(letters_arpa)
    assert capsys.readouterr().err == (
        f"{tmp_path}/lm.arpa: 1 of its 2 words cannot be spelt by the units (such as zoo); they are never found\n"
    )
    write_arpa(tmp_path / "upper.arpa", ["AB"], 2)
    with pytest.raises(UserError, match=r"upper.arpa: none of its 1 words can be spelt"):
        made(str(tmp_path / "upper.arpa"))


def test_minus_infinity_in_a_language_model_forbids_no_number(letter_units: Units, tmp_path: Path) -> None:
    write_arpa(tmp_path / "lm.arpa", ["ab", "ba"], 2)
    text = (tmp_path / "lm.arpa").read_text().replace("-99.0000000", "-inf")
    (tmp_path / "lm.arpa").write_text(text)
    settings = DecodingSettings(decoder="beam", lm=str(tmp_path / "lm.arpa"), lm_weight=0.0)
    found = Decoder(settings, letter_units, 0.03)(said(letter_units, "ab"))[0]
    assert found.text == "ab" and np.isfinite(found.score)


def test_words_begin_where_the_first_frame_does(letter_units: Units) -> None:
    log_probs = said(letter_units, "ab")
    plain = Decoder(DecodingSettings(), letter_units, 0.03)(log_probs)[0].words[0]
    shifted = Decoder(DecodingSettings(), letter_units, 0.03, 0.045)(log_probs)[0].words[0]
    assert (shifted.start, shifted.end) == pytest.approx((plain.start + 0.045, plain.end + 0.045))
    assert Decoder(DecodingSettings(), letter_units, 0.03, -60.0)(log_probs)[0].words[0].start == 0.0
