from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio import recording as module
from asr_kd.audio.decode import decode
from asr_kd.audio.recording import Recording
from asr_kd.errors import AudioError

RATE, SECONDS = 8000, 3.0
KINDS = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "ogg": "OGG"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stereo recording of three seconds in every kind."""
    folder = tmp_path_factory.mktemp("recordings")
    sound = (
        np.random.default_rng(0).normal(0, 0.1, (int(RATE * SECONDS), 2)) + np.sin(np.arange(24000) / 900)[:, None] / 3
    )
    for kind, container in KINDS.items():
        soundfile.write(folder / f"a.{kind}", sound, RATE, format=container)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 23000), st.integers(1, 9000)), min_size=1, max_size=6),
    block=st.sampled_from([0.05, 0.7, 10.0]),
)
def test_stretches_are_those_of_the_whole(folder: Path, kind: str, spans: list[tuple[int, int]], block: float) -> None:
    """In whatever order they are asked for, overlapping or not."""
    path = folder / f"a.{kind}"
    whole, _ = decode(path.read_bytes(), "a", None, 60)
    before, module.BLOCK = module.BLOCK, block
    try:
        recording = Recording(path, "a")
        for first, count in spans:
            start, end = recording.bounds(first / RATE, min(first + count, 24000) / RATE)
            found, rate = recording.cut(start, end, None)
            expected = whole[first : first + count]
            assert rate == RATE and len(found) == len(expected)
            np.testing.assert_allclose(found, expected, atol=2e-3 if kind == "mp3" else 0)
    finally:
        module.BLOCK = before
    assert recording.seconds == pytest.approx(SECONDS, abs=0.1)


def test_a_recording_is_decoded_once_for_stretches_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = module.native_blocks
    monkeypatch.setattr(module, "BLOCK", 0.2)
    monkeypatch.setattr(module, "native_blocks", lambda *rest: passes.append(1) or real(*rest))
    recording = Recording(folder / "a.flac", "a")
    for start in np.arange(0, 2.9, 0.05):
        recording.cut(start, start + 0.1, None)
    assert len(passes) == 1
    recording.cut(0.0, 0.1, None)
    assert len(passes) == 2


def test_a_stretch_is_resampled_and_held_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 0.1)
    recording = Recording(folder / "a.wav", "a")
    found, rate = recording.cut(2.0, 2.5, 16000)
    assert rate == 16000 and len(found) == 8000
    assert recording._held.shape[0] < 0.8 * RATE  # not what lies before


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (1.0, 1.0, "from 1 to 1 s is empty"), (2.0, 1.0, "from 2 to 1 s is empty; it must end after it starts"), (-1.0, 1.0, "from -1 to 1 s lies outside"),
        (2.0, 3.2, r"from 2 to 3\.2 s lies outside of the recording, which has 3\.000 s"), (3.0, 3.05, "lies outside"), (9.0, None, "from 9 to 3 s is empty"),
    ],
)  # fmt: skip
def test_bounds_outside_are_named(folder: Path, start: float, end: float | None, message: str) -> None:
    with pytest.raises(AudioError, match=f"^a: the segment {message}|^a: .*{message}"):
        Recording(folder / "a.wav", "a").bounds(start, end)


def test_a_recording_without_samples_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    with pytest.raises(AudioError, match=r"^a: holds no samples \(zero length\); leave it out"):
        Recording(tmp_path / "a.wav", "a").bounds(0.0, None)


def test_bounds_that_others_rounded_are_taken(folder: Path) -> None:
    recording = Recording(folder / "a.wav", "a")
    assert recording.bounds(-0.01, 3.04) == (0.0, 3.0)
    assert recording.bounds(1.0, None) == (1.0, 3.0)


def test_what_is_wrong_is_said_of_the_stretch_alone(tmp_path: Path) -> None:
    """Channels that cancel out in a part, a sample that is no number, a FLAC that is damaged from a place on."""
    sound = np.random.default_rng(0).normal(0, 0.1, (24000, 2))
    sound[8000:16000, 1] = -sound[8000:16000, 0]
    sound[20000, 0] = np.nan
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="FLOAT")
    recording = Recording(tmp_path / "a.wav", "a")
    recording.cut(0.0, 1.0, None)
    with pytest.raises(AudioError, match=r"^a, 1 to 2 s: its 2 channels cancel out"):
        recording.cut(1.0, 2.0, None)
    with pytest.raises(AudioError, match=r"^a, 2\.2 to 2\.8 s: holds samples that are not numbers"):
        recording.cut(2.2, 2.8, None)
    assert len(recording.cut(2.6, 3.0, None)[0]) == 3200
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 400000), RATE)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[len(data) // 2] ^= 0x55
    (tmp_path / "a.flac").write_bytes(data)
    recording = Recording(tmp_path / "a.flac", "a")
    assert len(recording.cut(1.0, 2.0, None)[0]) == RATE
    for start in (40.0, 41.0):
        with pytest.raises(AudioError, match=r"^a: truncated or damaged"):
            recording.cut(start, start + 1, None)
