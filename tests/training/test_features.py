"""Features learned in a run: with whoever answers, killed and resumed, by two processes, and what they are good for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units, load_units
from tests.training.conftest import FEATURES
from tests.training.test_processes import assert_a_death_changes_nothing

Job = Callable[..., TrainSettings]
#: a pair of each match
PAIRS = [
    {"student": "layer.1", "teacher": "layer.1"},
    {"student": "layer.2", "teacher": "layer.1", "match": "cosine", "samples": "frames", "weight": 0.5},
    {"student": "layer.2", "teacher": "layer.1", "match": "energy", "samples": "frames"},
]


@pytest.fixture(scope="module")
def teachers(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two of unequal width."""
    folder, units = tmp_path_factory.mktemp("teachers"), load_units(letters)
    for size in (10, 4):
        torch.manual_seed(size)
        kind = ModelSettings(kind="blstm", layers=1, size=size)
        model = build_model(kind, FEATURES.dimension, units.size)
        torch.nn.init.normal_(model.output.weight, std=4.0)  # sure of what it says, so that there are spikes
        save_checkpoint(folder / str(size), model, units, FEATURES, kind)
    return [str(folder / "10"), str(folder / "4")]


def taught(job: Job, teacher: Any, pairs: Any = None, **changes: Any) -> TrainSettings:
    features = PAIRS if pairs is None else pairs
    source = {"targets": None, "teacher": teacher, "features": features, **changes.pop("source", {})}
    return job(source=source, **changes)


def state(run: Path | str) -> bytes:
    return (Path(run) / "last" / "state.safetensors").read_bytes()


def losses(run: Path | str) -> list[float]:
    rows = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("who", ["checkpoint", "several", "average"])
def test_killed_and_resumed_to_the_same_bits(
    job: Job, teachers: list[str], tmp_path: Path, resumed: Callable[..., None], who: str
) -> None:
    teacher = {"checkpoint": teachers[0], "several": teachers, "average": "average"}[who]

    def settings(name: str) -> TrainSettings:
        return taught(job, teacher, output=str(tmp_path / name), ema_decay=0.8, source={"augment": {"time_masks": 1}})

    train(settings("whole"))
    resumed(settings("run"))
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    held = safetensors.torch.load_file(tmp_path / "run" / "last" / "state.safetensors")
    width = {"checkpoint": 20, "several": 28, "average": 12}[who]
    beside = {name: tuple(held[name].shape) for name in held if name.startswith("model.beside") and "weight" in name}
    assert beside == {
        f"model.beside.features:layer-1:layer-1:hint:events:{width}.weight": (width, 12),
        f"model.beside.features:layer-2:layer-1:cosine:frames:{width}.weight": (width, 12),
    }
    assert not any("beside" in name for name in load_checkpoint(tmp_path / "run").model.state_dict())


def test_two_processes_of_which_one_dies(job: Job, teachers: list[str], tmp_path: Path) -> None:
    settings = taught(
        job, teachers[0], lanes=2, ema_decay=0.5, evaluate_every=5,
        phase={"passes": 2}, batch_frames=60, bucket_utterances=3,
    )  # fmt: skip
    assert_a_death_changes_nothing(settings, tmp_path)


def test_they_are_learned_alone_in_half_precision(job: Job, teachers: list[str]) -> None:
    """Without any other loss; each comes down."""
    settings = taught(job, teachers[0], source={"soft": 0.0}, phase={"passes": 8}, precision="bfloat16")
    train(settings)
    heard = losses(settings.output)
    assert sum(heard[-5:]) < 0.7 * sum(heard[:5])


def test_sources_with_unlike_teachers(job: Job, teachers: list[str]) -> None:
    """The same pair of layers, but states of two widths: two projections."""
    plain = taught(job, teachers[0], PAIRS[:1]).model_dump()
    source = plain["phases"][0]["sources"][0]
    plain["phases"][0]["sources"] = [source, source | {"teacher": teachers[1]}]
    settings = TrainSettings.model_validate(plain)
    train(settings)
    held = safetensors.torch.load_file(Path(settings.output) / "last" / "state.safetensors")
    assert {len(held[name]) for name in held if name.startswith("model.beside") and "weight" in name} == {20, 8}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            {"student": "layer.9"},
            r"features:layer-9:layer-1:hint:events.*: the network has no layer\.9; it has layer\.1, layer\.2",
        ),
        ({"teacher": "layer.2"}, r"features:layer-1:layer-2:hint:events: the teacher has no layer\.2; it has layer\.1"),
    ],
)
def test_a_layer_that_is_not_there_is_named(job: Job, teachers: list[str], pair: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(taught(job, teachers[0], [PAIRS[0] | pair]))


def test_chunks_are_refused(job: Job, teachers: list[str]) -> None:
    with pytest.raises(ValueError, match="chunks cannot learn from features:layer-1:layer-1:hint:events"):
        taught(job, teachers[0], PAIRS[:1], source={"soft": 0.0}, phase={"chunks": {"frames": 5}})


def test_a_hint_brings_the_student_s_states_closer_on_audio_that_it_has_not_heard(
    job: Job, units: Units, development: str, tmp_path: Path
) -> None:
    """From fresh weights, beside soft targets: a linear map of its states, fitted where it learned, misses less of the teacher's."""
    teacher, rarely = str(tmp_path / "teacher"), {"evaluate_every": 1000, "phase": {"passes": 10}}
    train(job(model={"kind": "blstm", "layers": 1, "size": 10}, output=teacher, **rarely))
    pair = {"student": "layer.1", "teacher": "layer.1", "samples": "frames"}
    missed = {}
    for name, pairs in (("without", []), ("with", [pair])):
        run = str(tmp_path / name)
        settings = taught(job, teacher, pairs, output=run, **rarely)
        train(settings)
        linear = torch.linalg.lstsq(*states(settings, run, teacher, units)).solution
        own, theirs = states(taught(job, teacher, source={"audio": development}), run, teacher, units)
        missed[name] = float((own @ linear - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())
    assert missed["with"] < 0.8 * missed["without"], missed


def states(settings: TrainSettings, run: str, teacher: str, units: Units) -> tuple[Tensor, Tensor]:
    """Of the student in a run, with a column of ones, and of the teacher, on the audio of the settings; float64 [frames, width]."""
    models = [load_checkpoint(folder).model.eval() for folder in (run, teacher)]
    stream, found = PhaseStream(settings, 0, units), []
    with torch.no_grad():
        for batch in filter(None, stream.batches(stream.start(), 0)):
            rows = [
                model(batch.features, batch.lengths, ["layer.1"]).hidden["layer.1"][batch.learned] for model in models
            ]
            found.append((torch.cat([rows[0], torch.ones(len(rows[0]), 1)], 1), rows[1]))
    own, theirs = (torch.cat(column).double() for column in zip(*found, strict=True))
    return own, theirs
