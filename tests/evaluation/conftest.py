from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, write_index, write_shard
from asr_kd.shards.texts import train_units

TEXTS = ("One, two.", "three four five", "six")


def noise(seconds: float, seed: int, rate: int = 8000) -> bytes:
    """A FLAC of noise."""
    data = io.BytesIO()
    soundfile.write(data, np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)), rate, format="FLAC")
    return data.getvalue()


def write_shards(folder: Path, shards: list[list[Sample]]) -> Path:
    folder.mkdir(parents=True)
    write_index(folder, [write_shard(folder / f"shard-{index:06d}.tar", one) for index, one in enumerate(shards)])
    return folder


def speech(key: str, seed: int, **fields: object) -> Sample:
    seconds = 0.5 + 0.2 * seed
    return Sample(key, noise(seconds, seed), "flac", {"seconds": seconds, **fields})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two untrained systems with different front ends; `student` looks like a run folder with a learning curve."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("systems")
    (root / "text.txt").write_text("one two three\nfour five six\n" * 3)
    units = train_units(UnitsSettings(source=str(root / "text.txt"), output=str(root / "units"), kind="char", size=30))
    teacher, student = ModelSettings(kind="blstm", layers=1, size=12), ModelSettings(layers=1, size=8, delay_frames=2)
    for seed, (folder, settings, rate) in enumerate(
        [(root / "teacher", teacher, 16000), (root / "student" / "best", student, 8000)]
    ):
        torch.manual_seed(seed)
        features = FeatureSettings(sample_rate=rate, mels=8)
        model = build_model(settings, features.dimension, units.size)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4.0)  # untrained networks answer with one unit throughout otherwise
        save_checkpoint(folder, model, units, features, settings)
    (root / "student" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "audio_hours": 0.1}\n'
        '{"step": 2, "audio_hours": 0.5, "development_wer": 0.9, "development_loss": 2}\n'
        '{"step": 4, "audio_hours": 1.0, "development_wer": 0.4, "development_loss": 1}\n{"step": 5, "audio'
    )
    return {"teacher": root / "teacher", "student": root / "student"}


@pytest.fixture(scope="session")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [speech(f"u{index}", index, text=text, speaker=f"s{index % 2}") for index, text in enumerate(TEXTS)]
    return write_shards(tmp_path_factory.mktemp("audio") / "test", [samples[:2], samples[2:]])


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two sets of three shards with two utterances each, one of which is bad."""
    samples = [
        speech(f"u{number}", number % 3, text=TEXTS[number % 3], snr=number, speaker=f"s{number % 2}", tags=["a"])
        for number in range(12)
    ]
    samples[3].audio = samples[3].audio[:500]
    shards = [samples[2 * number : 2 * number + 2] for number in range(6)]
    root = tmp_path_factory.mktemp("sets")
    return {
        "clean": str(write_shards(root / "clean", shards[:3])),
        "noisy": str(write_shards(root / "noisy", shards[3:])),
    }
