from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.ending import Stopped
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, read_index, read_shard, write_index, write_shard
from asr_kd.shards.texts import train_units
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import to_text
from asr_kd.targets.store import TargetMetadata, write_target_shard
from asr_kd.training import phase
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units

RATE = 8000
FEATURES = FeatureSettings(sample_rate=RATE, mels=8)
PITCH = {"a": 400.0, "b": 1600.0}


def tones(text: str, seed: int) -> bytes:
    """A FLAC in which every letter is 0.24 s of its own pitch, after a pause as long."""
    rng = np.random.default_rng(seed)
    time = np.arange(RATE * 24 // 100) / RATE
    parts = [part for letter in text for part in (0 * time, 0.4 * np.sin(2 * np.pi * PITCH[letter] * time))]
    sound = np.concatenate([*parts, 0 * time])
    data = io.BytesIO()
    soundfile.write(data, sound + rng.normal(0, 0.01, len(sound)), RATE, format="FLAC")
    return data.getvalue()


def sample(key: str, text: str, seed: int, **fields: Any) -> Sample:
    return Sample(key, tones(text, seed), "flac", {"seconds": 0.24 * (2 * len(text) + 1), "text": text, **fields})


def write_audio(folder: Path, shards: list[list[Sample]]) -> str:
    folder.mkdir(parents=True)
    write_index(folder, [write_shard(folder / f"shard-{number:06d}.tar", one) for number, one in enumerate(shards)])
    return str(folder)


def audio_of(folder: str) -> dict[str, np.ndarray]:
    """The waveforms of an audio set, by key."""
    samples = [item for info in read_index(Path(folder)) for item in read_shard(Path(folder) / info.name)]
    return {item.key: decode(item.audio, item.key, RATE, 60.0)[0] for item in samples}


def soft_target(item: Sample, units: Units, doubt: float = 0.02, frame_ms: int = 30) -> SparsePosteriors:
    """What a teacher with perfect timing and some doubt says of the tones."""
    waveform, _ = decode(item.audio, item.key, RATE, 60.0)
    frames = len(Frontend(FEATURES.model_copy(update={"stack": frame_ms // FEATURES.hop_ms})).compute(waveform))
    # the middle of a frame's audio
    place = (np.arange(frames) * frame_ms + (frame_ms + FEATURES.window_ms) / 2) // 240
    dense = np.full((frames, units.size), doubt / (units.size - 1))
    for row, part in zip(dense, place.astype(int), strict=True):
        text = item.fields["text"]
        row[units.encode(text[part // 2])[-1] if part % 2 and part // 2 < len(text) else units.blank] = 1 - doubt
    return SparsePosteriors.from_dense(np.log(dense / dense.sum(1, keepdims=True)), 3, 0.99)


def write_targets(
    folder: Path,
    audio: str,
    units: Units,
    leave_out: tuple[str, ...] = (),
    doubt: float = 0.02,
    target: SparsePosteriors | None = None,
    **changes: Any,
) -> str:
    """Soft targets of an audio set; `target`, where it is given, for all utterances."""
    folder.mkdir(parents=True)
    frame_ms = changes.get("frame_ms", 30)
    for number, info in enumerate(read_index(Path(audio))):
        samples = read_shard(Path(audio) / info.name)
        pairs = [(item.key, target or soft_target(item, units, doubt, frame_ms)) for item in samples]
        pairs = [(key, target) for key, target in pairs if key not in leave_out]
        kept = 1.0 - float(np.concatenate([one.tail for _, one in pairs]).mean())
        statistics = {
            "utterances": len(pairs), "frames": sum(one.frames for _, one in pairs), "audio_seconds": info.seconds,
            "entries_per_frame": 3.0, "bytes_per_frame": 4.0, "mean_kept_mass": kept, "mean_kl": 0.0, "worst_kl": 0.0,
            "top1_kept": 1.0,
        }  # fmt: skip
        values: dict[str, Any] = {
            "codec": {"version": 1, "levels": 128}, "selection": {"mode": "mass", "k": 3, "mass": 0.99},
            "teacher": "0123456789abcdef", "units_hash": units.hash, "num_units": units.size, "frame_ms": 30,
            "features": FEATURES.model_dump(), "audio_sha256": info.sha256,
            "quarantined": dict.fromkeys(leave_out, "bad"), "statistics": statistics,
            "tail_prior": to_text((np.arange(units.size) * (3 + 5 * number)).astype(np.uint8)),
        }  # fmt: skip
        write_target_shard(folder / info.name, TargetMetadata.model_validate(values | changes), pairs)
    return str(folder)


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the units `a` and `b`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("letters")
    (folder / "text.txt").write_text("ab\nba\naab\n" * 5)
    train_units(UnitsSettings(source=str(folder / "text.txt"), output=str(folder / "units"), kind="char", size=10))
    return folder / "units"


@pytest.fixture(scope="session")
def units(letters: Path) -> Units:
    return Units((letters / "units.model").read_bytes())


@pytest.fixture(scope="session")
def audio(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = ["ab", "ba", "a", "b", "abb", "bab", "aa", "bb", "aba", "bba"]
    samples = [sample(f"u{number}", text, number) for number, text in enumerate(texts)]
    return write_audio(tmp_path_factory.mktemp("data") / "audio", [samples[:4], samples[4:7], samples[7:]])


@pytest.fixture(scope="session")
def development(tmp_path_factory: pytest.TempPathFactory) -> str:
    samples = [sample("d0", "ab", 100), sample("d1", "b", 101), sample("d2", "baa", 102)]
    return write_audio(tmp_path_factory.mktemp("data") / "development", [samples])


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory, audio: str, units: Units) -> str:
    return write_targets(tmp_path_factory.mktemp("data") / "targets", audio, units)


@pytest.fixture
def job(letters: Path, development: str, audio: str, targets: str, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run on the tones: one phase on soft targets unless told otherwise."""

    def make(**changes: Any) -> TrainSettings:
        source = {"audio": audio, "targets": targets, "soft": 1.0, **changes.pop("source", {})}
        phase = {"sources": [source], "passes": 2, "learning_rate": 0.01, **changes.pop("phase", {})}
        values: dict[str, Any] = {
            "output": str(tmp_path / "run"), "units": str(letters), "development": development, "phases": [phase],
            "features": FEATURES.model_dump(), "model": {"layers": 2, "size": 12, "delay_frames": 2},
            "batch_frames": 100, "bucket_utterances": 4, "evaluate_every": 3, "device": "cpu", "tensorboard": False,
        }  # fmt: skip
        return TrainSettings.model_validate(values | changes)

    return make


@pytest.fixture
def stopped_at_every_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainSettings], None]:
    """Trains to the end, told to stop in every step and started again."""

    def run(settings: TrainSettings) -> None:
        real = phase.step

        def stopped(*arguments: Any) -> float:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        monkeypatch.setattr(phase, "step", stopped)
        for _ in range(100):
            try:
                train(settings)
                break
            except Stopped:
                pass
        monkeypatch.setattr(phase, "step", real)

    return run


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains, is told to stop in the step after `after` others, and goes on to the end unless told otherwise."""

    def run(settings: TrainSettings, after: int = 4, finish: bool = True) -> None:
        real, steps = phase.step, iter(range(1000))

        def interrupted(*arguments: Any) -> float:
            if next(steps) == after:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        monkeypatch.setattr(phase, "step", interrupted)
        with pytest.raises(Stopped):
            train(settings)
        monkeypatch.setattr(phase, "step", real)
        if finish:
            train(settings)

    return run
