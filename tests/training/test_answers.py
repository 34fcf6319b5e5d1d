"""Who answers in the step: a checkpoint and the run's own average fill the same parts as stored targets."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from asr_kd.distillation.answers import answer
from asr_kd.distillation.batch import Batch
from asr_kd.ending import Stopped
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, load_checkpoint, log_posteriors, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training import phase
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units, load_units
from tests.training.conftest import FEATURES
from tests.training.test_processes import launched

Job = Callable[..., TrainSettings]


@pytest.fixture(scope="module")
def teacher(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(5)
    folder, units = tmp_path_factory.mktemp("teacher"), load_units(letters)
    kind = ModelSettings(kind="blstm", layers=1, size=10)
    model = build_model(kind, FEATURES.dimension, units.size)
    torch.nn.init.normal_(model.output.weight, std=4.0)  # sure of what it says
    save_checkpoint(folder, model, units, FEATURES, kind)
    return str(folder)


def online(job: Job, teacher: str, **changes: Any) -> TrainSettings:
    source = {"targets": None, "teacher": teacher, **changes.pop("source", {})}
    return job(source=source, **changes)


def state(run: Path) -> bytes:
    return (run / "last" / "state.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_checkpoint_teaches_what_its_stored_targets_teach(job: Job, teacher: str, audio: str, tmp_path: Path) -> None:
    """The same batches, so the losses differ by what the stored targets have rounded."""
    targets = str(tmp_path / "targets")
    label(LabelSettings(teacher=teacher, audio=audio, output=targets, mode="top_k", k=100, device="cpu"))
    train(job(source={"targets": targets}, output=str(tmp_path / "stored")))
    train(online(job, teacher, output=str(tmp_path / "online")))
    stored, answered = losses(tmp_path / "stored"), losses(tmp_path / "online")
    assert len(stored) > 10
    np.testing.assert_allclose(answered, stored, rtol=0.01)
    assert stored[-1] < stored[0] - 0.05  # far more than they differ by


def test_it_hears_neither_noise_nor_masks_nor_another_vocal_tract(job: Job, teacher: str, units: Units) -> None:
    augment = {
        "time_masks": 2,
        "mel_masks": 2,
        "mel_warp": 0.3,
        "noise": {"share": 1.0, "kinds": ["white"], "snr_max": 0.0},
    }
    noisy = online(job, teacher, source={"augment": augment}, phase={"passes": 1})
    plain = online(job, teacher, phase={"passes": 1})
    heard: list[list[Batch]] = []
    for settings in (noisy, plain):
        stream = PhaseStream(settings, 0, units)
        heard.append([batch for batch in stream.batches(stream.start(), 0) if batch])
    for changed, clean in zip(*heard, strict=True):
        assert changed.clean is not None
        torch.testing.assert_close(changed.clean, clean.features, rtol=0, atol=0)
        assert not torch.equal(changed.features, clean.features)


def test_a_stretch_is_heard_by_both(job: Job, teacher: str, units: Units) -> None:
    stream = PhaseStream(online(job, teacher, source={"augment": {"stretch": 0.4}}, phase={"passes": 1}), 0, units)
    for batch in filter(None, stream.batches(stream.start(), 0)):
        assert batch.clean is not None
        torch.testing.assert_close(batch.clean, batch.features, rtol=0, atol=0)


def test_the_answer_is_the_network_s_distribution(teacher: str) -> None:
    checkpoint = load_checkpoint(teacher)
    features = torch.randn(2, 7, FEATURES.dimension)
    lengths = torch.tensor([7, 4])
    batch = Batch(features, lengths, torch.tensor([1, 0]), torch.tensor([6, 4]), 0, clean=features, teacher=teacher)
    parts = answer(checkpoint.model.train(), batch)
    rows = torch.cat(
        [
            log_posteriors(checkpoint, [features[0].numpy()])[0][1:6],
            log_posteriors(checkpoint, [features[1, :4].numpy()])[0],
        ]
    )
    dense = torch.zeros_like(rows).scatter_(1, parts["soft.units"].values, parts["soft.probs"].values)
    torch.testing.assert_close(dense, rows.exp())
    assert (parts["soft.units"].values[:, 0] == rows.argmax(1)).all()
    assert not parts["soft.tail"].values.any()


@pytest.mark.parametrize("missing", ["renormalise", "ghost", "prior", "uniform"])
def test_with_any_policy_for_missing_mass(job: Job, teacher: str, tmp_path: Path, missing: str) -> None:
    """Nothing is missing, so all are the same."""
    runs = {}
    for policy in ("ghost", missing):
        train(online(job, teacher, output=str(tmp_path / policy), missing_mass=policy, phase={"passes": 1}))
        runs[policy] = load_checkpoint(tmp_path / policy / "best").model.state_dict()
    for name, weight in runs["ghost"].items():
        torch.testing.assert_close(runs[missing][name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("who", ["checkpoint", "average"])
def test_killed_and_resumed_to_the_same_bits(
    job: Job, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    def settings(name: str) -> TrainSettings:
        teaching = teacher if who == "checkpoint" else "average"
        return online(
            job, teaching, output=str(tmp_path / name), ema_decay=0.8, source={"ctc": 0.5, "augment": {"time_masks": 1}}
        )

    train(settings("whole"))
    real, steps = phase.step, iter(range(100))

    def interrupted(*arguments: Any) -> float:
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(phase, "step", interrupted)
    with pytest.raises(Stopped):
        train(settings("run"))
    train(settings("run"))
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_a_loader_process_changes_nothing(job: Job, teacher: str, tmp_path: Path) -> None:
    for workers in (0, 1):
        noisy = {"augment": {"noise": {"share": 1.0, "kinds": ["white"]}}}
        train(online(job, teacher, output=str(tmp_path / str(workers)), loader_workers=workers, source=noisy))
    assert state(tmp_path / "0") == state(tmp_path / "1")


def test_the_average_itself_learns_nothing_from_its_answers(job: Job, tmp_path: Path) -> None:
    """What it says has no gradient: soft targets of one's own average alone move the weights little, and stay finite."""
    settings = online(job, "average", ema_decay=0.5, output=str(tmp_path / "run"))
    train(settings)
    held = safetensors.torch.load_file(tmp_path / "run" / "last" / "state.safetensors")
    assert all(weight.isfinite().all() for weight in held.values() if weight.is_floating_point())


@pytest.mark.parametrize("who", ["checkpoint", "average"])
def test_two_processes_of_which_one_dies(job: Job, teacher: str, tmp_path: Path, who: str) -> None:
    found = {}
    for how in ("lives", "dies"):
        (tmp_path / how).mkdir()
        settings = online(
            job, teacher if who == "checkpoint" else "average", output=str(tmp_path / how / "run"), lanes=2, ema_decay=0.5,
            phase={"passes": 3}, batch_frames=60, bucket_utterances=3,
        )  # fmt: skip
        found[how] = state(launched(settings, tmp_path / how, 2, how))
    assert found["lives"] == found["dies"]


def test_another_checkpoint_in_its_place_is_noticed(job: Job, teacher: str, letters: Path, tmp_path: Path) -> None:
    settings = online(job, teacher)
    train(settings)
    torch.manual_seed(6)
    kind = ModelSettings(kind="blstm", layers=1, size=10)
    units = load_units(letters)
    other = tmp_path / "other"
    save_checkpoint(other, build_model(kind, FEATURES.dimension, units.size), units, FEATURES, kind)
    with pytest.raises(UserError, match="teacher"):
        train(online(job, str(other)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"targets": "somewhere"}, "targets and teacher both answer; give one of the two"),
        ({"spikes": {}}, "learned frame by frame"),
        ({"soft": 0.0, "ctc": 1.0}, "go together with a soft weight"),
        ({"teacher": "average"}, "teacher: average needs ema_decay above 0"),
    ],
)
def test_what_does_not_go_together(job: Job, teacher: str, source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        online(job, teacher, source=source)


def test_a_teacher_of_other_features_is_refused(job: Job, letters: Path, tmp_path: Path) -> None:
    units, kind = load_units(letters), ModelSettings(layers=1, size=6)
    features = FEATURES.model_copy(update={"mels": FEATURES.mels + 1})
    save_checkpoint(tmp_path / "other", build_model(kind, features.dimension, units.size), units, features, kind)
    with pytest.raises(UserError, match="hears other features than this run"):
        train(online(job, str(tmp_path / "other")))
