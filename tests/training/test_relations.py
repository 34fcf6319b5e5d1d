"""Relations learned in the loop: of a checkpoint that answers in the step, and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import load_units
from tests.training.conftest import FEATURES
from tests.training.test_processes import assert_a_death_changes_nothing

Job = Callable[..., TrainSettings]
BETWEEN = {"student": "layer.2", "teacher": "layer.1"}
FLOW = {"student": "layer.1", "student_to": "layer.2", "teacher": "layer.1", "teacher_to": "layer.2"}
#: the student has two layers of 12, the teachers two of 12 and of 20
KINDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("similarity", "distance", "angle", "probability", "correlation", "gram"), BETWEEN),
    "flow": FLOW, "classes": {}, "attention": {"student": "attention.2", "teacher": "attention.1", "heads": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def teachers(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    units, folders = load_units(letters), {}
    for name, kind in (
        ("wide", ModelSettings(kind="blstm", layers=2, size=10)),
        ("equal", ModelSettings(layers=2, size=12)),
        ("attends", ModelSettings(kind="conformer", layers=2, size=20, heads=2)),
    ):
        torch.manual_seed(5)
        model = build_model(kind, FEATURES.dimension, units.size)
        torch.nn.init.normal_(model.output.weight, std=4.0)  # sure of what it says: it has spikes
        folders[name] = str(tmp_path_factory.mktemp("teachers") / name)
        save_checkpoint(folders[name], model, units, FEATURES, kind)
    return folders


def learning(job: Job, teachers: dict[str, str], kind: str, **changes: Any) -> TrainSettings:
    who = {"flow": "equal", "attention": "attends"}.get(kind, "wide")
    if kind == "attention":
        changes["model"] = {"kind": "conformer", "layers": 2, "size": 12, "heads": 2, "kernel": 5}
    relations = [{"kind": kind, **KINDS[kind]}]
    source = {"targets": None, "teacher": teachers[who], "soft": 0.0, "relations": relations}
    return job(source=source | changes.pop("source", {}), **changes)


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def state(run: Path) -> bytes:
    return (run / "last" / "state.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_learned_alone(job: Job, teachers: dict[str, str], tmp_path: Path, kind: str) -> None:
    train(learning(job, teachers, kind, phase={"passes": 8, "warmup": 0.05}, evaluate_every=1000))
    found = losses(tmp_path / "run")
    assert 1e-4 < found[0] < 2
    assert sum(found[-6:]) < 0.8 * sum(found[:6])
    names = safetensors.torch.load_file(tmp_path / "run" / "last" / "state.safetensors")
    assert not any("beside" in name for name in names)


@pytest.mark.parametrize("kind", ["angle", "classes", "attention"])
def test_killed_and_resumed_to_the_same_bits(
    job: Job, teachers: dict[str, str], tmp_path: Path, resumed: Callable[..., None], kind: str
) -> None:
    def settings(name: str) -> TrainSettings:
        return learning(job, teachers, kind, output=str(tmp_path / name), source={"soft": 1.0})

    train(settings("whole"))
    resumed(settings("run"))
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_two_processes_of_which_one_dies(job: Job, teachers: dict[str, str], tmp_path: Path) -> None:
    """Each relates what its own lane hears; the batches of the two differ in utterances and in spikes."""
    settings = learning(
        job, teachers, "distance", source={"soft": 0.5}, lanes=2, ema_decay=0.5,
        phase={"passes": 3}, batch_frames=60, bucket_utterances=3,
    )  # fmt: skip
    assert_a_death_changes_nothing(settings, tmp_path)


def test_stored_targets_teach_their_confusions(job: Job, tmp_path: Path) -> None:
    train(job(source={"relations": [{"kind": "classes"}]}))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_all_at_once_with_a_schedule_and_the_average_as_teacher(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student is like itself, and soon no more like its average; nothing of it is not finite."""
    relations = [
        {"kind": kind, "weight": {"start": 1.0, "end": 0.0}, **layers}
        | ({"teacher": "layer.2"} if layers is BETWEEN else {})
        for kind, layers in KINDS.items()
        if kind != "attention"
    ]
    source = {"targets": None, "teacher": "average", "soft": 0.0, "ctc": 1.0, "relations": relations}
    train(job(source=source, ema_decay=0.9))
    assert all(loss == loss and loss < 1e3 for loss in losses(tmp_path / "run"))
    assert all(weight.isfinite().all() for weight in load_checkpoint(tmp_path / "run").model.parameters())
