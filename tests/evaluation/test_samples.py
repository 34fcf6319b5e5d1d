from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile

from asr_kd.evaluation import samples
from asr_kd.evaluation.samples import gather
from asr_kd.evaluation.schema import Report
from tests.evaluation import made
from tests.evaluation.made import changed, system


def report_of(audio: str | dict[str, str], checkpoints: dict[str, Path], *keys: str) -> Report:
    shards = {"u2": "shard-000001.tar"}
    listed = [{"key": key, "set": "test", "shard": shards.get(key, "shard-000000.tar"), "why": ""} for key in keys]
    report = made.report_of({name: system(5) for name in checkpoints})
    systems = {name: str(path) for name, path in checkpoints.items()}
    return changed(report, samples=listed, settings__audio=audio, settings__systems=systems)


def test_clips_can_be_played_and_posteriors_share_rows(audio: Path, checkpoints: dict[str, Path]) -> None:
    found = gather(report_of({"test": str(audio)}, checkpoints, "u1", "u2"), ["teacher", "student"])
    assert list(found.clips) == [("test", "u1", "shard-000000.tar"), ("test", "u2", "shard-000001.tar")]
    for clip, seconds in zip(found.clips.values(), (0.7, 0.9), strict=True):
        assert clip.seconds == pytest.approx(seconds)
        with soundfile.SoundFile(io.BytesIO(base64.b64decode(clip.audio))) as file:
            assert file.format == "MP3"
            assert file.frames / file.samplerate >= seconds - 0.05
    assert found.shown == ("test", "u1", "shard-000000.tar")
    assert [one.title for one in found.pictures] == ["Spectrogram", "teacher", "student"]
    assert found.pictures[1].rows == found.pictures[2].rows
    for one in found.pictures[1:]:
        image = matplotlib.image.imread(io.BytesIO(base64.b64decode(one.image)), format="png")
        assert image.shape[:2] == (len(one.rows), round(one.seconds / 0.03))
        assert 0.5 < one.seconds <= 0.7


def test_what_cannot_be_played_says_why(
    audio: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gather(report_of(str(audio), checkpoints, "u9", "u0"), ["student"])
    assert "u9 is not there any more" in found.clips["test", "u9", "shard-000000.tar"].problem
    assert found.shown == ("test", "u0", "shard-000000.tar")
    found = gather(report_of(str(audio.parent / "gone"), checkpoints, "u0"), ["student"])
    assert found.clips["test", "u0", "shard-000000.tar"].problem
    assert found.shown is None
    assert found.pictures == []
    monkeypatch.setattr(samples, "CLIP_BYTES", 10)
    found = gather(report_of(str(audio), checkpoints, "u0"), ["student"])
    assert found.clips["test", "u0", "shard-000000.tar"].problem == "left out to keep the page small"
    assert found.pictures


def test_without_matplotlib_there_are_clips_and_no_pictures(
    audio: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samples, "find_spec", lambda _: None)
    found = gather(report_of(str(audio), checkpoints, "u0"), ["student"])
    assert found.clips["test", "u0", "shard-000000.tar"].audio and found.pictures == []
    assert "asr-kd[report]" in capsys.readouterr().err


def test_rows_are_the_blank_and_the_heaviest_units() -> None:
    probs = np.array([[0.9, 0.0, 0.1], [0.1, 0.0, 0.9], [0.95, 0.02, 0.03]])
    assert samples._rows([(probs, ["∅", "faint", "b"])]) == ["∅", "b"]
    assert samples._rows([]) == []
