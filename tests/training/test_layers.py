"""A run that begins with layers of another checkpoint: what it starts from, resuming, what it says of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training.provenance import apart
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.training.conftest import FEATURES

Job = Callable[..., TrainSettings]
DEEP = ModelSettings(kind="lstm", layers=4, size=12, delay_frames=2)
#: soft targets, text and the direction of hidden states, of a teacher with the student's width
TRIPLE = {
    "soft": 1.0, "ctc": 0.5,
    "features": [{"student": "layer.2", "teacher": "layer.4", "match": "cosine", "samples": "frames", "projection": False}],
}  # fmt: skip


@pytest.fixture
def deep(tmp_path: Path, units: Units) -> str:
    torch.manual_seed(7)
    model = build_model(DEEP, FEATURES.dimension, units.size)
    torch.nn.init.normal_(model.output.weight, std=4.0)  # sure of what it says
    save_checkpoint(tmp_path / "deep", model, units, FEATURES, DEEP)
    return str(tmp_path / "deep")


def triple(job: Job, deep: str, **changes: Any) -> TrainSettings:
    source = {"targets": None, "teacher": deep, **TRIPLE}
    return job(init=deep, init_layers=[1, 4], source=source, calibrate_blank=False, **changes)


def test_it_begins_as_the_teacher_s_layers_and_says_so(job: Job, deep: str, tmp_path: Path) -> None:
    held = {"phase": {"passes": 1, "learning_rate": 1e-12}, "weight_decay": 0.0, "calibrate_blank": False}
    train(job(init=deep, init_layers=[1, 4], **held))
    found, theirs = load_checkpoint(tmp_path / "run"), load_checkpoint(deep).model.state_dict()
    for name, weight in found.model.state_dict().items():
        torch.testing.assert_close(weight, theirs[name.replace("forwards.1", "forwards.3")])
    assert found.settings.layers == 2 and found.training["settings"]["init_layers"] == [1, 4]
    assert found.training["started_from"]["folder"] == deep
    # as a start of a run of its own it is a network like another
    train(job(init=str(tmp_path / "run"), output=str(tmp_path / "next"), phase={"passes": 1}))


def test_killed_and_resumed_to_the_same_bits(job: Job, deep: str, tmp_path: Path, resumed: Callable[..., None]) -> None:
    train(triple(job, deep, output=str(tmp_path / "whole"), ema_decay=0.8))
    resumed(triple(job, deep, ema_decay=0.8))
    for name in ("last/state.safetensors", "best/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "run" / "best" / "beside.safetensors").exists()  # nothing stands beside it


def test_the_three_losses_bring_it_to_its_teacher(job: Job, deep: str, tmp_path: Path) -> None:
    train(triple(job, deep, phase={"passes": 8}))
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_other_layers_or_another_teacher_are_another_run(job: Job, deep: str, tmp_path: Path, units: Units) -> None:
    train(triple(job, deep, phase={"passes": 1}))
    other = triple(job, deep, phase={"passes": 1}).model_copy(update={"init_layers": [1, 3]})
    with pytest.raises(UserError, match=r"belongs to other settings \(init_layers was \[1, 4\], now \[1, 3\]\)"):
        train(other)
    shutil.rmtree(deep)
    save_checkpoint(deep, build_model(DEEP, FEATURES.dimension, units.size), units, FEATURES, DEEP)
    with pytest.raises(UserError, match="belongs to other settings"):
        train(triple(job, deep, phase={"passes": 1}))


def test_what_is_not_used_is_not_in_the_settings_of_a_run(job: Job) -> None:
    pair = {"student": "layer.1", "teacher": "layer.1"}
    said = job(source={"features": [pair]}).model_dump()
    assert "init_layers" not in said and "projection" not in said["phases"][0]["sources"][0]["features"][0]
    said = job(init="x", init_layers=[1, 3], source={"features": [pair | {"projection": False}]}).model_dump()
    assert said["init_layers"] == [1, 3] and not said["phases"][0]["sources"][0]["features"][0]["projection"]
    assert TrainSettings.model_validate(said).model_dump() == said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_layers": [1, 4]}, "init_layers are layers of init; give init"),
        (
            {"init": "x", "init_layers": [1, 2, 4]},
            "init_layers names 3 layers and the network has 2; name one for each",
        ),
        (
            {"init": "x", "init_layers": [2, 4]},
            "the first layer of kind lstm hears features.*name 1 first, and nowhere",
        ),
        (
            {"init": "x", "init_layers": [1, 1]},
            "the first layer of kind lstm hears features.*name 1 first, and nowhere",
        ),
        ({"init": "x", "init_layers": [0, 1]}, "greater than or equal to 1"),
    ],
)
def test_layers_that_cannot_be_copied_are_refused(job: Job, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_any_layer_can_be_the_first_where_an_input_layer_is_before_it(job: Job) -> None:
    assert job(init="x", init_layers=[3, 4], model={"kind": "separable", "layers": 2}).init_layers == [3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_layers": [1, 5]}, r"init_layers: .*deep has no layer 5; name layers from 1 to 4"),
        ({}, r"or say which of its 4 layers these 2 begin as: init_layers=\[1, 4\]$"),
        ({"model": {"layers": 2, "size": 8}}, r"another network than this run's model; use the same model settings \(but for bits, .*\)$"),
        ({"init_layers": [1, 4], "model": {"layers": 2, "size": 8}}, r"\(but for layers, bits, and .*\)$"),
    ],
)  # fmt: skip
def test_what_this_checkpoint_cannot_give_is_refused(
    job: Job, deep: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(job(init=deep, **changes))


@pytest.mark.parametrize(
    ("count", "of", "layers"), [(2, 4, [1, 4]), (3, 4, [1, 2, 4]), (6, 12, [1, 3, 5, 7, 9, 12]), (1, 4, [1]), (4, 4, [1, 2, 3, 4])]
)  # fmt: skip
def test_layers_as_far_apart_as_they_can_be(count: int, of: int, layers: list[int]) -> None:
    assert apart(count, of) == layers


def test_states_of_another_width_need_a_projection(job: Job, deep: str) -> None:
    source = {"targets": None, "teacher": deep, **TRIPLE}
    message = r"features:.*as-it-is.*: the student's layer.2 is 8 wide and the teacher's layer.4 12; leave out projection: false"
    with pytest.raises(UserError, match=message):
        train(job(source=source, model={"layers": 2, "size": 8}))
