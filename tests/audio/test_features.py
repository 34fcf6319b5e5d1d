from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance.kaldi import get_mel_banks

from asr_kd.audio.features import KALDI_PRIOR_MEAN, LOG_SCALE, PRIOR_HOPS, PRIOR_MEAN, CausalMean, Frontend, versioned
from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.spectrum import LOG_FLOOR
from asr_kd.errors import AudioError

SMALL = FeatureSettings(sample_rate=8000, mels=8)


def speech_like(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0, 0.3, samples // 400 + 1), 400)[:samples]
    return (loudness * rng.normal(size=samples)).astype(np.float32)


def slow_mean(frames: np.ndarray, time_constant: int, prior: float = PRIOR_MEAN) -> np.ndarray:
    """The recursion that the causal mean stands for, a frame at a time."""
    count, mean = min(PRIOR_HOPS, time_constant), np.full(frames.shape[1], prior)
    means = []
    for frame in frames.astype(np.float64):
        count += 1
        mean = mean + (frame - mean) / (count if count <= time_constant + 1 else time_constant)
        means.append(mean)
    return np.array(means)


def test_defaults_are_the_papers() -> None:
    front = Frontend(FeatureSettings())
    assert (front.spectrum.window, front.spectrum.hop) == (400, 160)
    assert (front.settings.mels, front.settings.stack, front.settings.frame_ms, front.settings.dimension) == (
        64,
        3,
        30,
        192,
    )
    assert front.overhang_ms == 15
    features = front.compute(speech_like(16000))
    assert features.shape == (32, 192) and features.dtype == np.float16  # 98 hops


@given(samples=st.integers(0, 3000), stack=st.integers(1, 8), window=st.integers(5, 60), hop=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_frames_are_those_that_the_audio_fills(samples: int, stack: int, window: int, hop: int) -> None:
    front = Frontend(FeatureSettings(sample_rate=8000, mels=8, stack=stack, window_ms=window, hop_ms=hop))
    hops = sum(start + 8 * window <= samples for start in range(0, samples, 8 * hop))
    audio = speech_like(samples)
    if hops < stack:
        with pytest.raises(AudioError, match=f"too short: {samples} samples"):
            front.compute(audio)
    else:
        assert front.compute(audio).shape == (hops // stack, 8 * stack)


def test_stacking_is_a_rearrangement() -> None:
    audio = speech_like(8000)
    single = Frontend(SMALL.model_copy(update={"stack": 1})).compute(audio)
    for stack in (2, 3, 5):
        stacked = Frontend(SMALL.model_copy(update={"stack": stack})).compute(audio)
        assert len(stacked) == len(single) // stack
        for index, row in enumerate(stacked):
            expected = np.concatenate([single[index * stack + part] for part in range(stack)])
            np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-5)  # rounded to float16 apart


@pytest.mark.parametrize(("rate", "mels"), [(16000, 64), (8000, 40)])
def test_equals_a_reference_made_of_other_parts(rate: int, mels: int) -> None:
    wanted = FeatureSettings(sample_rate=rate, mels=mels, stack=1, mean_frames=80)
    audio, front = speech_like(2 * rate), Frontend(wanted)
    windows = torch.from_numpy(audio).double().unfold(0, front.spectrum.window, front.spectrum.hop)
    power = torch.fft.rfft(
        windows * torch.hann_window(front.spectrum.window + 2, False, dtype=torch.float64)[1:-1], front.spectrum.fft
    )
    filters, _ = get_mel_banks(mels, front.spectrum.fft, float(rate), 20.0, rate / 2, 100.0, -500.0, 1.0)
    # Kaldi leaves out the bin at the Nyquist rate, where the last filter ends
    logs = torch.log(power.abs()[:, :-1] ** 2 @ filters.double().T + LOG_FLOOR).numpy()
    expected = (logs - slow_mean(logs, 80)) / LOG_SCALE
    np.testing.assert_allclose(front.compute(audio), expected, rtol=1e-3, atol=2e-3)


def test_every_default_filter_hears_something() -> None:
    for rate in (8000, 16000):
        front = Frontend(FeatureSettings(sample_rate=rate))
        assert (front.spectrum.filters.sum(0) > 0.1).all()
        assert front.spectrum.filters.max() <= 1.0


@given(
    frames=st.integers(1, 450), time_constant=st.sampled_from([1, 2, 49, 50, 51, 100, 300]), seed=st.integers(0, 1000)
)
@settings(max_examples=40, deadline=None)
def test_causal_mean_equals_its_recursion(frames: int, time_constant: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(-3, 2, (frames, 3)).astype(np.float32)
    np.testing.assert_allclose(
        CausalMean(time_constant, rows.shape[1]).push(rows), slow_mean(rows, time_constant), atol=1e-5
    )


@pytest.mark.parametrize("mean_frames", [20, 300])
def test_future_audio_changes_no_earlier_frame(mean_frames: int) -> None:
    front = Frontend(SMALL.model_copy(update={"mean_frames": mean_frames}))
    audio = speech_like(40000)
    features = front.compute(audio)
    period = front.spectrum.hop * SMALL.stack
    for frame in (0, 7, 40, 120):
        end = frame * period + 2 * front.spectrum.hop + front.spectrum.window  # the last sample that the frame reads
        assert end <= (frame + 1) * period + front.overhang_ms * 8
        changed = audio.copy()
        changed[end:] = speech_like(len(audio) - end, seed=frame + 1)
        np.testing.assert_array_equal(front.compute(changed)[: frame + 1], features[: frame + 1])
        assert not np.allclose(front.compute(changed)[frame + 1], features[frame + 1])
        # what a stream has heard so far gives the same frames
        np.testing.assert_allclose(front.compute(audio[:end]), features[: frame + 1], rtol=1e-3, atol=1e-5)


def test_level_is_removed_and_silence_is_finite() -> None:
    front = Frontend(FeatureSettings(sample_rate=8000, mels=8, mean_frames=50))
    audio = speech_like(80000)
    quiet, loud = front.compute(0.1 * audio), front.compute(audio)
    assert np.abs(quiet[200:] - loud[200:]).mean() < 0.02
    assert np.abs(quiet[0] - loud[0]).mean() > 0.5  # the first frames keep theirs
    silence = front.compute(np.zeros(8000, np.float32))
    assert np.isfinite(silence).all() and np.abs(silence).max() < 3
    assert np.abs(loud).max() < 10


@given(
    samples=st.integers(0, 30000), sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    rate=st.sampled_from([8000, 16000]), stack=st.integers(1, 4), hop=st.sampled_from([10, 40]),
    time_constant=st.sampled_from([1, 40, 60, 300]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_stream_in_any_pieces_gives_the_same_bits(
    samples: int, sizes: list[int], rate: int, stack: int, hop: int, time_constant: int
) -> None:
    front = Frontend(FeatureSettings(sample_rate=rate, stack=stack, hop_ms=hop, mean_frames=time_constant))
    audio, whole, stream = speech_like(samples), front.start(), front.start()
    parts, at, turn = [], 0, 0
    while at < samples or turn < len(sizes):
        size = max(sizes[turn % len(sizes)], 0 if turn < len(sizes) else 1)
        parts.append(stream.push(audio[at : at + size]))
        at, turn = at + size, turn + 1
    np.testing.assert_array_equal(np.concatenate(parts), whole.push(audio))


KALDI = FeatureSettings(kind="kaldi", sample_rate=8000, mels=20, stack=4)


@given(
    samples=st.integers(0, 30000), sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    rate=st.sampled_from([8000, 11025, 16000]), stack=st.integers(1, 4), time_constant=st.sampled_from([1, 60, 300]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_kaldi_in_any_pieces_gives_the_same_bits(
    samples: int, sizes: list[int], rate: int, stack: int, time_constant: int
) -> None:
    wanted = FeatureSettings(kind="kaldi", sample_rate=rate, mels=20, stack=stack, mean_frames=time_constant)
    front, audio = Frontend(wanted), speech_like(samples)
    stream, parts, at, turn = front.start(), [], 0, 0
    while at < samples or turn < len(sizes):
        size = max(sizes[turn % len(sizes)], 0 if turn < len(sizes) else 1)
        parts.append(stream.push(audio[at : at + size]))
        at, turn = at + size, turn + 1
    parts.append(stream.finish())
    assert len(np.concatenate(parts)) == front.frames(samples)
    if not front.frames(samples):
        with pytest.raises(AudioError, match=f"too short: {samples} samples"):
            front.compute(audio)
        return
    features = front.compute(audio)
    np.testing.assert_array_equal(np.concatenate(parts), features)
    logs = front.spectrum.of(audio)
    expected = (logs - slow_mean(logs, time_constant, KALDI_PRIOR_MEAN)) / LOG_SCALE
    expected = expected[: len(features) * stack].reshape(features.shape)
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3)


def test_a_kaldi_frame_hears_the_half_of_its_last_window_that_is_beyond_its_middle() -> None:
    front, audio = Frontend(KALDI), speech_like(8000)
    features = front.compute(audio)
    for frame in (0, 7, 15):
        end = (frame + 1) * 320 + 60  # 7.5 ms
        changed = np.concatenate([audio[:end], speech_like(8000 - end, seed=frame + 1)])
        np.testing.assert_array_equal(front.compute(changed)[: frame + 1], features[: frame + 1])
        changed[end - 5] += 0.5  # the taper ends in 0
        assert not np.array_equal(front.compute(changed)[frame], features[frame])
    assert front.overhang_ms == 8


def test_a_front_end_is_named_with_its_version_where_it_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = versioned(SMALL), versioned(KALDI)
    assert own.keys() == {"sample_rate", "mels", "window_ms", "hop_ms", "stack", "mean_frames"}
    assert (other["kind"], other["frontend"]) == ("kaldi", 1)
    monkeypatch.setattr("asr_kd.audio.features.KALDI_VERSION", 2)
    assert versioned(SMALL) == own
    assert versioned(KALDI) == {**other, "frontend": 2}


@pytest.mark.parametrize("front", [Frontend(SMALL), Frontend(KALDI)], ids=["own", "kaldi"])
def test_what_is_left_for_later_is_the_sound_itself_and_counts_its_frames(front: Frontend) -> None:
    audio = np.round(speech_like(8000) * 32768).clip(-32768, 32767).astype(np.float32) / 32768
    whole = front.defer(audio)
    assert whole.sound.dtype == np.int16 and len(whole) == len(front.compute(audio))
    np.testing.assert_array_equal(whole.sound / np.float32(32768), audio)
    for loud in (audio + np.float32(1e-5), np.append(audio, np.float32(1.0)), np.append(audio, np.float32(-90.0))):
        kept = front.defer(loud).sound
        assert kept.dtype == np.float32
        np.testing.assert_array_equal(kept, loud)
    for wrong in (audio[:30], audio * np.nan, audio[None]):
        with pytest.raises(AudioError) as now:
            front.compute(wrong)
        with pytest.raises(AudioError) as later:
            front.defer(wrong)
        assert str(now.value) == str(later.value)
