"""Critics in the real loop: beside sources that have none, killed and resumed, in two processes, and left behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asr_kd.ending import Stopped
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training import phase
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import load_units
from tests.training.conftest import FEATURES
from tests.training.test_processes import launched

Job = Callable[..., TrainSettings]
LAYERS = {"student": "layer.2", "teacher": "layer.1"}
CRITICS = [{"weight": 0.3}, {"samples": "frames"}, {**LAYERS, "weight": {"start": 0.0, "end": 1.0}}]


@pytest.fixture(scope="module")
def teacher(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(5)
    folder, units = tmp_path_factory.mktemp("teacher"), load_units(letters)
    kind = ModelSettings(kind="blstm", layers=1, size=10)
    model = build_model(kind, FEATURES.dimension, units.size)
    torch.nn.init.normal_(model.output.weight, std=4.0)  # sure of what it says: it has spikes
    save_checkpoint(folder, model, units, FEATURES, kind)
    return str(folder)


def all_sources(job: Job, teacher: str, **changes: Any) -> TrainSettings:
    """A source that a teacher answers in the step, one with stored targets, one with peers, and one that has no critic."""
    sources: list[dict[str, Any]] = [
        {"targets": None, "teacher": teacher, "critics": CRITICS}, {"critics": CRITICS[:1]}, {"mutual": {"critic": 0.3}},
        {"targets": None, "soft": 0.0, "ctc": 1.0},
    ]  # fmt: skip
    made = [job(source=one).phases[0].sources[0].model_dump() for one in sources]
    return job(phase={"sources": made, "passes": 1}, **changes)


def state(run: Path) -> bytes:
    return (run / "last" / "state.safetensors").read_bytes()


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_metrics_say_how_often_each_critic_is_right_and_the_student_leaves_alone(job: Job, teacher: str, tmp_path: Path) -> None:  # fmt: skip
    train(all_sources(job, teacher, evaluate_every=1000))
    run = tmp_path / "run"
    names = {name for row in rows(run) for name in row if name.endswith("accuracy")}
    assert names == {f"{name}:accuracy" for name in (
        "critics:outputs:events", "critics:outputs:frames", "critics:layer-2:layer-1:events:20", "mutual:critic.0", "mutual:critic.1",
    )}  # fmt: skip
    assert all(0 <= value <= 1 for row in rows(run) for name, value in row.items() if name.endswith("accuracy"))
    assert any(not any(name.endswith("accuracy") for name in row) for row in rows(run))  # that of the last source
    assert not any("critic" in name or "beside" in name for name in load_checkpoint(run).model.state_dict())


def test_a_critic_without_weight_changes_no_bit_of_the_student(job: Job, teacher: str, tmp_path: Path) -> None:
    source = {"targets": None, "teacher": teacher}
    critics = [{**one, "weight": 0.0} for one in CRITICS]
    train(job(source=source | {"critics": critics}, output=str(tmp_path / "with")))
    train(job(source=source, output=str(tmp_path / "without")))
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / name / "last" / "state.safetensors") for name in ("with", "without")
    )
    names = [name for name in theirs if name.startswith("model.")]
    assert names and all(torch.equal(ours[name], theirs[name]) for name in names)
    assert any("judge" in name or "critics" in name for name in ours)


def test_killed_and_resumed_to_the_same_bits(
    job: Job, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(all_sources(job, teacher, output=str(tmp_path / "whole"), ema_decay=0.8))
    settings = all_sources(job, teacher, output=str(tmp_path / "run"), ema_decay=0.8)
    real, steps = phase.step, iter(range(100))

    def interrupted(*arguments: Any) -> float:
        if next(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(phase, "step", interrupted)
    with pytest.raises(Stopped):
        train(settings)
    train(settings)
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    assert [row["loss"] for row in rows(tmp_path / "run")] == [row["loss"] for row in rows(tmp_path / "whole")]


def test_two_processes_of_which_one_dies(job: Job, teacher: str, tmp_path: Path) -> None:
    found = {}
    for how in ("lives", "dies"):
        (tmp_path / how).mkdir()
        settings = all_sources(
            job, teacher, output=str(tmp_path / how / "run"), lanes=2, evaluate_every=3, batch_frames=80, bucket_utterances=3,
        )  # fmt: skip
        found[how] = state(launched(settings, tmp_path / how, 2, how))
    assert found["lives"] == found["dies"]


@pytest.mark.parametrize(("keep", "samples"), [("events", "events"), ("frames", "frames")])
def test_stored_hidden_states_are_judged_and_their_codes_are_not(
    job: Job, teacher: str, audio: str, tmp_path: Path, keep: str, samples: str
) -> None:
    for name, more in ((keep, {}), ("codes", {"codebooks": 2})):
        asked = {
            "teacher": teacher,
            "audio": audio,
            "output": str(tmp_path / name),
            "mode": "hidden",
            "taps": ["layer.1"],
            "keep": name,
        }
        label(LabelSettings.model_validate({**asked, "device": "cpu", **more}))
    critics = [{**LAYERS, "samples": samples}]
    train(job(source={"targets": str(tmp_path / keep), "critics": critics}, phase={"passes": 1}))
    assert all(f"critics:layer-2:layer-1:{samples}:20:accuracy" in row for row in rows(tmp_path / "run"))
    with pytest.raises(UserError, match="codes holds codes of hidden states, which critics:layer-2:layer-1"):
        train(job(source={"targets": str(tmp_path / "codes"), "critics": critics}, output=str(tmp_path / "other")))


def test_an_alignment_is_refused(job: Job, teacher: str, audio: str, tmp_path: Path) -> None:
    asked = {
        "teacher": teacher,
        "audio": audio,
        "output": str(tmp_path / "alignment"),
        "mode": "alignment",
        "device": "cpu",
    }
    label(LabelSettings.model_validate(asked))
    with pytest.raises(
        UserError,
        match="was labelled with mode=alignment, which a critic would tell from a student's answers by its form",
    ):
        train(job(source={"targets": str(tmp_path / "alignment"), "critics": [{}]}))
