from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio import vad
from asr_kd.audio.vad import CHUNK, FRAME, RATE, Silero, above_floor, silero_file, track
from asr_kd.errors import UserError

SILERO = pytest.param(
    Silero,
    marks=pytest.mark.skipif(
        not importlib.util.find_spec("silero_vad") or not importlib.util.find_spec("onnxruntime"),
        reason="needs asr-kd[vad]",
    ),
)
NOISE = np.random.default_rng(0).normal(0, 0.01, 2 * CHUNK + 3 * FRAME + 100).astype(np.float32)
NOISE[RATE : 3 * RATE] *= 20


def blocks(sound: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    at = 0
    while at < len(sound):
        for size in sizes:
            yield sound[at : at + size]
            at += size


@pytest.mark.parametrize("network", [lambda: None, SILERO])
@pytest.mark.parametrize("sizes", [[1000, 0, 77_777], [FRAME], [CHUNK, 1], [10**7]])
def test_blocks_of_any_size_are_heard_alike(network: Callable[[], vad.Network | None], sizes: list[int]) -> None:
    whole, found = track([NOISE], network()), track(blocks(NOISE, sizes), network())
    assert found.samples == whole.samples == len(NOISE)
    np.testing.assert_array_equal(found.levels, whole.levels)
    np.testing.assert_array_equal(found.scores, whole.scores)
    assert len(found.scores) == len(found.levels) == -(-len(NOISE) // FRAME)


def test_levels_are_those_of_each_frame_whatever_the_offset() -> None:
    sound = 0.25 + 0.1 * np.sin(2 * np.pi * 500 * np.arange(3 * RATE) / RATE).astype(np.float32)
    sound[RATE : 2 * RATE] = 0.25
    levels = track([sound], None).levels
    np.testing.assert_allclose(levels[:31], -23.01, atol=0.2)  # 0.1² / 2
    assert (levels[32:62] == vad.QUIETEST).all()


def test_no_sound_has_no_frames() -> None:
    found = track([], None)
    assert (found.samples, len(found.scores), len(found.levels)) == (0, 0, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-80, 0, width=32), min_size=1, max_size=200), st.floats(-20, 20))
def test_scores_are_above_the_noise_whatever_the_loudness(levels: list[float], louder: float) -> None:
    heard = np.array(levels, np.float32)
    scores = above_floor(heard)
    assert scores.dtype == np.float32 and scores.min() >= 0 and scores.max() <= 1
    np.testing.assert_allclose(above_floor(heard + np.float32(louder)), scores, atol=1e-4)
    floor = np.sort(heard)[int(0.1 * len(heard))]
    np.testing.assert_allclose(scores, np.clip((heard - floor) / vad.LOUD, 0, 1), atol=1e-5)


def test_noise_that_becomes_louder_is_noise_again_after_half_a_minute() -> None:
    heard = np.repeat(np.float32([-70, -40]), 3000)
    heard[5000:5010] = -20
    scores = above_floor(heard)
    assert scores[:2900].max() == 0 and scores[3000:3010].min() == 1  # a step cannot be told from speech at once
    assert scores[3600:5000].max() == 0 and scores[5000:5010].min() == 1


def test_silero_hears_each_recording_from_its_beginning_and_frame_after_frame() -> None:
    """As the network that its package gives to those who listen live, one frame at a time with the end of the one before."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if not importlib.util.find_spec("silero_vad"):
        pytest.skip("needs asr-kd[vad]")
    live = onnxruntime.InferenceSession(silero_file().with_name("silero_vad.onnx"), providers=["CPUExecutionProvider"])
    sound = NOISE[: 100 * FRAME]
    heard, state, expected = np.pad(sound, (64, 0)), np.zeros((2, 1, 128), np.float32), []
    for at in range(0, len(sound), FRAME):
        inputs = {"input": heard[None, at : at + 64 + FRAME], "state": state, "sr": np.array(RATE)}
        score, state = live.run(None, inputs)
        expected.append(score.item())
    for _ in range(2):
        np.testing.assert_allclose(track([sound], Silero()).scores, expected, atol=1e-4)


@pytest.mark.parametrize("missing", ["silero_vad", "onnxruntime"])
def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(UserError, match=r"segment\.detector: silero needs .* pip install 'asr-kd\[vad\]', or set"):
        silero_file()
