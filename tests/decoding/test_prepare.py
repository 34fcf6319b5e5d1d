"""Recordings with text through `prepare`, cut by a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.verbs import VERBS
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import read_index, read_shard
from asr_kd.units import Units

RATE = 8000


@pytest.fixture
def recordings(tmp_path: Path) -> str:
    """Two recordings of three bursts of noise, with a text of three words each."""
    rng, lines = np.random.default_rng(0), []
    for name in "ab":
        sound = np.concatenate([np.zeros(RATE), *(rng.normal(0, level, RATE) for level in (0.2, 0.001) * 3)])
        soundfile.write(tmp_path / f"{name}.wav", sound.clip(-1, 1), RATE)
        lines.append(json.dumps({"audio": f"{name}.wav", "text": "ab ba abba"}) + "\n")
    (tmp_path / "list.jsonl").write_text("".join(lines))
    return str(tmp_path / "list.jsonl")


@pytest.fixture
def checkpoint(tmp_path: Path, letter_units: Units) -> str:
    """Of a network with random weights."""
    torch.manual_seed(3)
    features, kind = FeatureSettings(sample_rate=RATE, mels=8), ModelSettings(layers=1, size=8)
    save_checkpoint(
        tmp_path / "checkpoint", build_model(kind, features.dimension, letter_units.size), letter_units, features, kind
    )
    return str(tmp_path / "checkpoint")


def run(recordings: str, output: Path, aligner: str, **given: Any) -> list[tuple[str, bytes, str]]:
    cut = {
        "detector": "energy", "max_seconds": 4.0, "aligner": aligner, "min_score": -99.0, "recordings_per_shard": 1,
    }  # fmt: skip
    settings = {"manifest": recordings, "output": str(output), "segment": cut, **given}
    VERBS["prepare"].do(PrepareSettings.model_validate(settings))
    samples = [one for info in read_index(str(output)) for one in read_shard(output / info.name)]
    return [(one.key, one.audio, one.fields["text"]) for one in samples]


def test_a_checkpoint_cuts_recordings_with_text_in_any_number_of_processes(
    recordings: str, checkpoint: str, tmp_path: Path
) -> None:
    alone = run(recordings, tmp_path / "alone", checkpoint)
    for name in "ab":
        assert " ".join(text for key, _, text in alone if key.startswith(name)) == "ab ba abba"
    assert len(alone) > 2
    assert run(recordings, tmp_path / "shared", checkpoint, workers=2) == alone


def test_a_missing_checkpoint_is_said_before_anything_is_written(recordings: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "none")):
        run(recordings, tmp_path / "shards", str(tmp_path / "none"))
    assert not (tmp_path / "shards").exists()
