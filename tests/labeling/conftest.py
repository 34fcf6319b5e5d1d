from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, write_index, write_shard
from asr_kd.shards.texts import train_units
from asr_kd.units import Units

RATE = 8000
FEATURES = FeatureSettings(sample_rate=RATE, mels=8, stack=3)


def flac(seconds: float, seed: int) -> bytes:
    """A hum with some noise."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.05, len(time))
    data = io.BytesIO()
    soundfile.write(data, 0.3 * np.sin(2 * np.pi * (200 + 40 * seed) * time) + noise, RATE, format="FLAC")
    return data.getvalue()


def write_audio(folder: Path, shards: list[list[Sample]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    infos = [write_shard(folder / f"shard-{number:06d}.tar", samples) for number, samples in enumerate(shards)]
    write_index(folder, infos)
    return folder


def utterance(key: str, seconds: float, seed: int) -> Sample:
    return Sample(key, flac(seconds, seed), "flac", {"seconds": seconds, "text": "one two"})


@pytest.fixture(scope="session")
def units(tmp_path_factory: pytest.TempPathFactory) -> Units:
    folder = tmp_path_factory.mktemp("units")
    (folder / "text.txt").write_text("one two three\nfour five six\nseven eight nine zero\n" * 3)
    source, output = str(folder / "text.txt"), str(folder / "units")
    return train_units(UnitsSettings(source=source, output=output, kind="char", size=40))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, units: Units) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = ModelSettings(kind="blstm", layers=1, size=8)
    model = build_model(settings, FEATURES.dimension, units.size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    folder = tmp_path_factory.mktemp("teacher")
    save_checkpoint(folder, model, units, FEATURES, settings)
    return folder


@pytest.fixture(scope="session")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def shard(number: int) -> list[Sample]:
        seconds = [0.6 + 0.17 * ((5 * number + 3 * item) % 7) for item in range(4)]
        return [utterance(f"s{number}-u{item}", seconds[item], 10 * number + item) for item in range(4)]

    return write_audio(tmp_path_factory.mktemp("audio"), [shard(number) for number in range(3)])


@pytest.fixture
def job(teacher: Path, audio: Path, tmp_path: Path) -> Callable[..., LabelSettings]:
    """Settings of a label job on the shared teacher and audio."""

    def make(**changes: object) -> LabelSettings:
        values: dict[str, object] = {
            "teacher": str(teacher), "audio": str(audio), "output": str(tmp_path / "targets"),
            "batch_frames": 120, "device": "cpu",
        }  # fmt: skip
        if "mode" not in changes:
            values |= {"k": 8, "mass": 0.99}
        return LabelSettings.model_validate(values | changes)

    return make
