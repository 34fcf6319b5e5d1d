"""Conditions of test sets: noise at the stated ratio, of the stated colour, rooms that keep the timing, and nothing that clips."""

from __future__ import annotations

import numpy as np
import pytest

from asr_kd.audio.conditions import add_noise, babble, in_condition, pink, reverberate


@pytest.mark.parametrize("decibels", [-5, 0, 5, 10, 20])
def test_noise_is_added_at_the_stated_ratio_to_active_speech(decibels: int) -> None:
    rng = np.random.default_rng(0)
    speech = rng.integers(-3000, 3001, 8000) * (np.arange(8000) < 2400)  # a pause follows, which does not count
    for noise in (pink(8000, 8000, rng), 40 * rng.integers(-300, 301, 8000)):
        added = add_noise(speech, noise, decibels, 8000) - speech
        ratio = np.mean(speech[:2400].astype(float) ** 2) / np.mean(added.astype(float) ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(decibels, abs=0.05)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_reverberation_begins_with_the_direct_sound(rate: int) -> None:
    click = np.zeros(4000, np.int16)
    click[1000] = 20000
    for seed in range(5):
        wet = reverberate(click, rate, np.random.default_rng(seed))
        assert np.argmax(np.abs(wet)) == 1000 and not wet[:1000].any() and wet[1001:].any()
        assert (wet**2).sum() == pytest.approx(20000**2, rel=0.02)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_pink_noise_falls_by_three_decibels_an_octave(rate: int) -> None:
    spectrum = np.abs(np.fft.rfft(pink(10 * rate, rate, np.random.default_rng(0)))) ** 2
    frequencies = np.fft.rfftfreq(10 * rate, 1 / rate)
    bands = [
        10 * np.log10(spectrum[(frequencies >= low) & (frequencies < 2 * low)].mean()) for low in (62.5, 250, 1000)
    ]
    assert bands[0] - bands[1] == pytest.approx(6, abs=1.5) and bands[1] - bands[2] == pytest.approx(6, abs=1.5)


def test_babble_is_made_of_the_voices_however_short_they_are() -> None:
    voices = [np.full(length, height, np.int16) for length, height in ((30, 100), (50, 200))]
    heard = babble(voices, 1000, np.random.default_rng(0))
    assert len(heard) == 1000 and 600 <= heard.min() < heard.max() <= 1200


@pytest.mark.parametrize("condition", ["clean", "babble 20 dB", "pink 0 dB", "reverberation"])
@pytest.mark.parametrize("waveform", [np.zeros(500), 32767 * np.sign(np.sin(np.arange(500))), np.ones(3)])
def test_every_condition_takes_any_sound(condition: str, waveform: np.ndarray) -> None:
    """Silence, a sound of full scale, and one shorter than a piece of it."""
    said, voices = waveform.astype(np.int16), [np.arange(-300, 300, dtype=np.int16)]
    heard, again = (in_condition(condition, said, 8000, voices, np.random.default_rng(1)) for _ in range(2))
    assert heard.dtype == np.int16 and heard.shape == said.shape
    assert np.array_equal(heard, again) and np.array_equal(heard, said) == (condition == "clean" or not said.any())


def test_a_condition_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="brown 3 dB: no such condition"):
        in_condition("brown 3 dB", np.ones(10, np.int16), 8000, [], np.random.default_rng(0))
