from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.waveform import LOST, WINDOW, Mixer, from_array
from asr_kd.errors import AudioError

FLOATS = np.random.default_rng(0).uniform(-0.5, 0.5, (800, 2)).astype(np.float32)


@pytest.mark.parametrize(
    ("samples", "step"),
    [
        (FLOATS, 0), (FLOATS.astype(np.float64), 0), (FLOATS.astype(np.float16), 1e-3), (np.rint(FLOATS * 32768).astype(np.int16), 2e-5),
        (np.rint(FLOATS * 2.0**31).astype(np.int32), 1e-6), (np.rint(FLOATS * 128 + 128).astype(np.uint8), 5e-3),
    ],
)  # fmt: skip
def test_arrays_become_the_waveform_that_they_hold(samples: np.ndarray, step: float) -> None:
    found = from_array(samples, 8000, 8000)
    assert found.dtype == np.float32 and found.shape == (800,)
    np.testing.assert_allclose(found, FLOATS.mean(axis=1), atol=step + 1e-7)
    np.testing.assert_allclose(from_array(samples[:, 0], 8000, 8000), FLOATS[:, 0], atol=step)
    assert len(from_array(samples, 8000, 16000)) == 1600


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (FLOATS, None, "needs its sample rate in Hz, not None"), (FLOATS, 16, "needs its sample rate in Hz, not 16"), (FLOATS, 8000.0, "needs its sample rate"),
        (FLOATS.T, 8000, r"must be \[samples\] or \[samples, channels\], not \[2, 800\]; transpose it"), (FLOATS[None], 8000, r"not \[1, 800, 2\]"),
        (FLOATS.astype(np.int64), 8000, "must hold floats, int16, int32 or uint8, not int64"), (FLOATS > 0, 8000, "not bool"), (FLOATS * 32768, 8000, "where full scale is 1"),
        (FLOATS * np.nan, 8000, "not numbers"), (FLOATS[:0], 8000, "zero length"), (np.stack([FLOATS[:, 0], -FLOATS[:, 0]], axis=1), 8000, "2 channels cancel out"),
        ("a.wav", 8000, "not "), (np.rint(FLOATS * 32767).astype(np.int32), 8000, "16 bits as int32, .* convert it to int16"), (8000, FLOATS, r"not \[\]; "),
    ],
)  # fmt: skip
def test_arrays_that_are_no_sound_are_refused(samples: Any, rate: Any, message: str) -> None:
    with pytest.raises(AudioError, match=f"^the array: .*{message}"):
        from_array(samples, rate, 8000)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (FLOATS, r"must be float32 \[samples\], mono, not float32 \[800, 2\]; make it one with asr_kd\.audio\.waveform\.from_array"),
        ((FLOATS[:, 0] * 32768).astype(np.int16), r"not int16 \[800\]"), (FLOATS[:, 0].tolist(), "not list"), (FLOATS[:, 0] * 32768, "reach 1.*e[+]04 where full scale is 1"),
        (FLOATS[:, 0] * np.nan, "reach nan"),
    ],
)  # fmt: skip
def test_the_front_end_hears_waveforms_alone(waveform: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        Frontend(FeatureSettings(sample_rate=8000)).compute(waveform)


def test_doubles_are_heard_as_floats() -> None:
    frontend = Frontend(FeatureSettings(sample_rate=8000))
    found = frontend.compute(FLOATS[:, 0].astype(np.float64))
    np.testing.assert_array_equal(found, frontend.compute(FLOATS[:, 0]))


@pytest.mark.parametrize("pieces", [1, 7])
def test_channels_are_judged_over_a_window(pieces: int) -> None:
    """A part of a window in which they cancel out is no fault; and the other way round."""
    left, right = FLOATS[:, 0], FLOATS[:, 1]
    stereo = np.concatenate([np.stack([left, -left], axis=1), np.stack([left, right], axis=1)])
    mixer = Mixer()
    found = np.concatenate([mixer.mix(piece) for piece in np.array_split(stereo, pieces)])
    mixer.finish()
    np.testing.assert_array_equal(found, stereo.mean(axis=1, dtype=np.float32))
    mixer = Mixer()
    for piece in np.array_split(np.stack([left, -0.95 * left], axis=1), pieces):
        mixer.mix(piece)
    with pytest.raises(AudioError, match=r"^its 2 channels cancel out"):
        mixer.finish()


@pytest.mark.parametrize("pieces", [1, 7, 1000])
@pytest.mark.parametrize("share", [0, 0.15, 0.5])
def test_channels_that_cancel_out_for_a_part_of_a_recording(pieces: int, share: float) -> None:
    left = np.random.default_rng(0).normal(0, 0.1, 20 * WINDOW).astype(np.float32)
    right = np.where(np.arange(len(left)) < share * len(left), -left, left)
    mixer = Mixer()
    for piece in np.array_split(np.stack([left, right], axis=1), pieces):
        mixer.mix(piece)
    if share < LOST:
        mixer.finish()
    else:
        with pytest.raises(AudioError, match="its 2 channels cancel out in 50% of it"):
            mixer.finish()
