from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance.kaldi import get_mel_banks

from asr_kd.audio.features import LOG_FLOOR, LOG_SCALE, PRIOR_HOPS, PRIOR_MEAN, CausalMean, Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import AudioError

SMALL = FeatureSettings(sample_rate=8000, mels=8)


def speech_like(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0, 0.3, samples // 400 + 1), 400)[:samples]
    return (loudness * rng.normal(size=samples)).astype(np.float32)


def slow_mean(frames: np.ndarray, time_constant: int) -> np.ndarray:
    """The recursion that the causal mean stands for, a frame at a time."""
    count, mean = min(PRIOR_HOPS, time_constant), np.full(frames.shape[1], PRIOR_MEAN)
    means = []
    for frame in frames.astype(np.float64):
        count += 1
        mean = mean + (frame - mean) / (count if count <= time_constant + 1 else time_constant)
        means.append(mean)
    return np.array(means)


def test_defaults_are_the_papers() -> None:
    front = Frontend(FeatureSettings())
    assert (front.window, front.hop) == (400, 160)
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
    windows = torch.from_numpy(audio).double().unfold(0, front.window, front.hop)
    power = torch.fft.rfft(windows * torch.hann_window(front.window + 2, False, dtype=torch.float64)[1:-1], front.fft)
    filters, _ = get_mel_banks(mels, front.fft, float(rate), 20.0, rate / 2, 100.0, -500.0, 1.0)
    # Kaldi leaves out the bin at the Nyquist rate, where the last filter ends
    logs = torch.log(power.abs()[:, :-1] ** 2 @ filters.double().T + LOG_FLOOR).numpy()
    expected = (logs - slow_mean(logs, 80)) / LOG_SCALE
    np.testing.assert_allclose(front.compute(audio), expected, rtol=1e-3, atol=2e-3)


def test_every_default_filter_hears_something() -> None:
    for rate in (8000, 16000):
        front = Frontend(FeatureSettings(sample_rate=rate))
        assert (front._filters.sum(0) > 0.1).all()
        assert front._filters.max() <= 1.0


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
    period = front.hop * SMALL.stack
    for frame in (0, 7, 40, 120):
        end = frame * period + 2 * front.hop + front.window  # the last sample that the frame reads
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
