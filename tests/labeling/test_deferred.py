"""Labelling with the teacher's features made on its device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings, VerifySettings
from asr_kd.labeling.verify import verify
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.tarset import Sample
from asr_kd.targets.store import read_target_shard
from asr_kd.units import Units
from tests.labeling.conftest import RATE, flac, utterance, write_audio

Job = Callable[..., LabelSettings]


def checked(settings: LabelSettings, most: float = 0.002) -> bool:
    return verify(
        VerifySettings(
            targets=settings.output, audio=settings.audio, teacher=settings.teacher, shards=None, device="cpu",
            max_difference=most, max_top1_share=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_the_targets_are_those_of_features_from_the_loader(
    job: Job, audio: Path, made: list[int], tmp_path: Path, workers: int
) -> None:
    here = job(features_on="device", loader_workers=workers)
    label(here)
    assert sum(made) == 12
    assert checked(here)
    assert sum(made) == 12, "verify heard the loader's features"
    there = job(output=str(tmp_path / "there"))
    label(there)
    assert sum(made) == 12
    for name in ("job.json", "quarantine.jsonl"):
        assert (Path(here.output) / name).read_bytes() == (Path(there.output) / name).read_bytes()


def test_what_one_has_begun_another_may_finish(job: Job, made: list[int]) -> None:
    label(job())
    one = sorted(Path(job().output).glob("*.tar"))[1]
    one.unlink()
    label(job(features_on="device"))
    assert sum(made) == 4 and one.exists()
    assert checked(job())


def test_what_cannot_be_used_is_quarantined_for_the_same_reasons(job: Job, made: list[int], tmp_path: Path) -> None:
    good = [utterance(f"good{number}", 0.7 + 0.3 * number, number) for number in range(3)]
    short = Sample("short", flac(0.03, 9), "flac", {"seconds": 0.03, "text": "one"})
    noise = Sample("noise", b"no sound", "flac", {"seconds": 1.0, "text": "one"})
    audio = write_audio(tmp_path / "odd", [[*good, short, noise]])
    said = []
    for where in ("loader", "device"):
        settings = job(
            audio=str(audio), output=str(tmp_path / where), features_on=where, max_bad_share=0.5, mode="alignment"
        )
        label(settings)
        said.append([json.loads(line) for line in (tmp_path / where / "quarantine.jsonl").read_text().splitlines()])
    assert said[0] == said[1] and [line["key"] for line in said[0]] == ["short", "noise"]
    assert sum(made) == 3


def test_hidden_states_and_their_quantiser_hear_them_too(job: Job, made: list[int]) -> None:
    asked = {"mode": "hidden", "taps": ["layer.1"], "keep": "codes", "codebooks": 2, "quantiser_frames": 100}
    settings = job(features_on="device", **asked)
    label(settings)
    assert sum(made) > 12
    assert checked(settings, 0.03)


@pytest.mark.parametrize("where", ["loader", "device"])
def test_a_teacher_may_hear_kaldis_features(
    job: Job, units: Units, made: list[int], tmp_path: Path, where: str
) -> None:
    torch.manual_seed(0)
    features = FeatureSettings(kind="kaldi", sample_rate=RATE, mels=8, stack=4)
    model = ModelSettings(layers=1, size=8)
    save_checkpoint(tmp_path / "kaldi", build_model(model, features.dimension, units.size), units, features, model)
    settings = job(teacher=str(tmp_path / "kaldi"), features_on=where)
    label(settings)
    assert sum(made) == (12 if where == "device" else 0)
    assert checked(settings)
    metadata, targets = read_target_shard(sorted(Path(settings.output).glob("*.tar"))[0])
    assert (metadata.features, metadata.frontend, metadata.frame_ms) == (features, 1, 40)
    assert all(np.isfinite(target.log_probs).all() for _, target in targets)


def test_of_a_teacher_that_hears_sound_no_features_can_be_made(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asr_kd.models.network.AcousticModel.hears_sound", True)
    with pytest.raises(UserError, match=r"features_on: .* hears the sound itself, .*; leave it out"):
        label(job(features_on="device"))
