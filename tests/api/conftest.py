from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, write_index, write_shard
from asr_kd.shards.texts import train_units

RATE = 8000
#: seconds of the utterances of each shard
SHARDS = ((0.6, 0.8), (1.1,))


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness changes, so that a network says something."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0, 0.5, int(seconds * 10) + 1), RATE // 10)[: int(seconds * RATE)]
    return loudness * rng.normal(0, 0.4, len(loudness))


def wav(seconds: float, seed: int = 0) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, sound(seconds, seed), RATE, format="WAV")
    return data.getvalue()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `student` and `teacher`, networks with random weights, a recording `talk.wav`, and audio `shards` with soft `targets`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("api")
    (root / "text.txt").write_text("one two three\n" * 3)
    units = train_units(UnitsSettings(source=str(root / "text.txt"), output=str(root / "units"), kind="char", size=20))
    torch.manual_seed(1)
    features = FeatureSettings(sample_rate=RATE, mels=8)
    for name, settings in (("student", ModelSettings(layers=1, size=8)), ("teacher", ModelSettings(kind="blstm", layers=2, size=8))):  # fmt: skip
        model = build_model(settings, features.dimension, units.size)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4.0)
        save_checkpoint(root / name, model, units, features, settings)
    (root / "talk.wav").write_bytes(wav(2.0, 7))
    (root / "shards").mkdir()
    infos = []
    for number, lengths in enumerate(SHARDS):
        keys = [f"u{2 * number + index}" for index in range(len(lengths))]
        samples = [Sample(key, wav(seconds, number), "wav", {"seconds": seconds, "text": "one"}) for key, seconds in zip(keys, lengths, strict=True)]  # fmt: skip
        samples += [Sample("broken", b"RIFF", "wav", {"seconds": 1.0})] * (number == 1)
        infos.append(write_shard(root / "shards" / f"shard-{number:06d}.tar", samples))
    write_index(root / "shards", infos)
    wanted = {"teacher": str(root / "teacher"), "audio": str(root / "shards"), "output": str(root / "targets")}
    more = {"mode": "hidden", "taps": ["layer.1"], "keep": "frames", "k": 4, "mass": 0.9, "max_bad_share": 0.5}
    label(LabelSettings.model_validate({**wanted, **more, "device": "cpu"}))
    return root


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, to work in; nothing in it is changed."""
    monkeypatch.chdir(made)
    return made
