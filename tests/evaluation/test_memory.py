from __future__ import annotations

import errno
from pathlib import Path

import pytest

from asr_kd.audio.settings import FeatureSettings
from asr_kd.evaluation.memory import peak_memory
from asr_kd.evaluation.parts import Shard
from asr_kd.evaluation.score import System
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.tarset import read_index


def test_a_system_takes_its_weights_and_more(checkpoints: dict[str, Path], audio: Path, tmp_path: Path) -> None:
    """A network of 40 MB beside one of some kilobytes, on the same audio."""
    small = load_checkpoint(checkpoints["student"])
    model, features = ModelSettings(layers=2, size=1024), FeatureSettings(sample_rate=8000)
    large = build_model(model, features.dimension, small.units.size)
    weights = 4 * sum(weight.numel() for weight in large.parameters())
    assert weights > 40e6
    save_checkpoint(tmp_path / "large", large, small.units, features, model)
    settings = EvalSettings(systems={"a": "a"}, audio=str(audio), output="-", device="cpu")
    took = []
    for folder in (checkpoints["student"], tmp_path / "large"):
        system = System("a", folder, load_checkpoint(folder))
        found = peak_memory(settings, system, Shard("test", str(audio), read_index(audio)[0]))
        assert found["peak_device_bytes"] is None
        took.append(found["peak_memory_bytes"])
    assert took[0] is not None and took[1] is not None
    assert took[0] < 20e6 < weights < took[1]


def test_without_shared_memory_it_is_not_known(
    checkpoints: dict[str, Path], audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def semaphore(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", semaphore)
    settings = EvalSettings(systems={"a": "a"}, audio=str(audio), output="-", device="cpu")
    system = System("a", checkpoints["student"], load_checkpoint(checkpoints["student"]))
    found = peak_memory(settings, system, Shard("test", str(audio), read_index(audio)[0]))
    assert found == {"peak_memory_bytes": None, "peak_device_bytes": None}
