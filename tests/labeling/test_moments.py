"""The job that stores the moments of a teacher's features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asr_kd import summary
from asr_kd.errors import UserError
from asr_kd.labeling.moments import moments
from asr_kd.labeling.settings import MomentsSettings
from asr_kd.models.acoustic import infer, load_checkpoint
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import Sample, read_index
from asr_kd.targets.moments import read_moments
from tests.training.conftest import FEATURES, audio, letters, sample, write_audio
from tests.training.test_critic import teacher

__all__ = ["audio", "letters", "teacher"]


def test_they_are_those_of_what_the_teacher_hears_and_says(teacher: str, audio: str, tmp_path: Path) -> None:
    asked = MomentsSettings(teacher=teacher, audio=audio, output=str(tmp_path / "m"), device="cpu", batch_frames=60)
    moments(asked)
    first = (tmp_path / "m").read_bytes()
    moments(asked)
    assert (tmp_path / "m").read_bytes() == first
    wanted = ShardInput(folder=audio, features=FEATURES, max_seconds=60.0)
    features = [item.features for info in read_index(audio) for item in load_features(wanted, info).items]
    checkpoint = load_checkpoint(teacher)
    said = np.concatenate([infer(checkpoint, [one])[0] for one in features])
    found = read_moments(tmp_path / "m", FEATURES.dimension)
    assert found.teacher == checkpoint.fingerprint
    assert found.spoken == pytest.approx((1 - np.exp(said[:, 0].astype(np.float64))).mean(), rel=1e-3)
    np.testing.assert_allclose(found.mean, np.concatenate(features).astype(np.float64).mean(0), atol=1e-3)


def test_audio_that_cannot_be_heard_is_refused_and_nothing_written(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [Sample("bad", b"RIFF", "wav", {"seconds": 1.0}), sample("good", "ab", 0)]
    folder = write_audio(tmp_path / "broken", [broken])
    asked = MomentsSettings(teacher=teacher, audio=folder, output=str(tmp_path / "m"), device="cpu")
    with pytest.raises(
        UserError, match=r"1 of 2 utterances cannot be heard, more than max_bad_share 0.01 \(first: bad"
    ):
        moments(asked)
    assert not (tmp_path / "m").exists()
    moments(asked.model_copy(update={"max_bad_share": 0.5}))
    assert "speaks; 1 of 2 utterances cannot be heard (first: bad" in capsys.readouterr().out
    assert summary._told.done == 1 and summary._told.audio_hours == pytest.approx(1.2 / 3600), "of what was heard"
    with pytest.raises(UserError, match="holds no utterances"):
        moments(asked.model_copy(update={"audio": write_audio(tmp_path / "empty", [])}))
