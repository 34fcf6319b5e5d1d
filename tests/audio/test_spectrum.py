from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.spectrum import kaldi, spectrum_of


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """Noise of changing loudness on an offset, and digital silence in its middle."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0, 0.3, samples // 400 + 1), 400)[:samples]
    made = (loudness * rng.normal(size=samples) + 0.02).astype(np.float32)
    made[samples // 3 : samples // 2] = 0.0
    return made


def theirs(waveform: np.ndarray, rate: int, mels: int, **frames: object) -> np.ndarray:
    native = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed")
    options = native.FbankOptions()
    for name, value in {"samp_freq": rate, "dither": 0.0, "snip_edges": False, **frames}.items():
        setattr(options.frame_opts, name, value)
    options.mel_opts.num_bins, options.mel_opts.low_freq = mels, 20.0
    options.mel_opts.high_freq = -400.0 if not options.frame_opts.snip_edges else 0.0
    fbank = native.OnlineFbank(options)
    fbank.accept_waveform(rate, waveform.tolist())
    fbank.input_finished()
    rows = [fbank.get_frame(at) for at in range(fbank.num_frames_ready)]
    return np.array(rows, np.float32).reshape(len(rows), mels)


@pytest.mark.parametrize(("rate", "mels"), [(8000, 40), (8000, 64), (16000, 64), (16000, 80), (11025, 40), (44100, 64)])
def test_kaldi_is_what_kaldi_native_fbank_computes(rate: int, mels: int) -> None:
    spectrum = spectrum_of(FeatureSettings(kind="kaldi", sample_rate=rate, mels=mels))
    for samples in (rate // 100, rate // 80, rate // 50, rate // 40, rate // 20 + 3, rate + 17):
        waveform = sound(samples, samples)
        expected = theirs(waveform, rate, mels)
        found = spectrum.of(waveform)
        assert found.dtype == np.float32 and len(found) == len(expected) == spectrum.hops(samples)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)
        assert np.abs(found - expected).mean() < 1e-5
    quiet = expected == np.log(np.float32(spectrum.floor))
    assert quiet.all(1).any()
    np.testing.assert_array_equal(found[quiet], expected[quiet])


def test_kaldi_of_whole_windows_in_16_bits_is_theirs_too() -> None:
    waveform = sound(16000)
    expected = theirs(waveform * 32768, 16000, 80, snip_edges=True)
    found = kaldi(16000, 80, below=0.0, mirrored=False, scale=32768.0).of(waveform)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_more_filters_than_kaldi_can_compute_are_refused(rate: int) -> None:
    with pytest.raises(ValidationError, match=f"is too many for kind kaldi at {rate} Hz: .* set at most") as refused:
        FeatureSettings(kind="kaldi", sample_rate=rate, mels=250)
    most = int(str(refused.value).split("at most ")[1].split()[0].rstrip("]"))
    FeatureSettings(kind="kaldi", sample_rate=rate, mels=most)
    theirs(sound(rate), rate, most)
    with pytest.raises(ValidationError, match=f"set at most {most}"):
        FeatureSettings(kind="kaldi", sample_rate=rate, mels=most + 1)
    with pytest.raises(ValueError, match="num_mel_bins too large"):
        theirs(sound(rate), rate, most + 1)


@pytest.mark.parametrize("setting", ["window_ms", "hop_ms"])
def test_what_kaldi_fixes_cannot_be_set(setting: str) -> None:
    with pytest.raises(ValidationError, match=f"{setting} belongs to kind own alone"):
        FeatureSettings(kind="kaldi", **{setting: 20})
