"""Who answers in the step: a checkpoint and the run's own average fill the same parts as stored targets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from asr_kd.config.schedule import ScheduleSettings, value_at
from asr_kd.distillation.answers import answer, prepare_answers, taught_by
from asr_kd.distillation.batch import Batch
from asr_kd.distillation.knowledge import Knowledge, Lesson, Seen, Task, lesson_of
from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, load_checkpoint, log_posteriors, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.targets.combine import combine
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.settings import CombineSettings
from asr_kd.training import phase
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units, load_units
from tests.training.conftest import FEATURES
from tests.training.test_processes import assert_a_death_changes_nothing

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


def test_spikes_are_found_in_what_is_answered(job: Job, teacher: str, audio: str, tmp_path: Path) -> None:
    targets = str(tmp_path / "targets")
    label(LabelSettings(teacher=teacher, audio=audio, output=targets, mode="top_k", k=100, device="cpu"))
    train(job(source={"targets": targets, "spikes": {}}, output=str(tmp_path / "stored")))
    train(online(job, teacher, output=str(tmp_path / "online"), source={"spikes": {}}))
    np.testing.assert_allclose(losses(tmp_path / "online"), losses(tmp_path / "stored"), rtol=0.01)


def test_transcripts_are_drawn_from_what_is_answered(job: Job, teacher: str, tmp_path: Path) -> None:
    """Cold, they are the teacher's greedy text: the loss is that of CTC on it."""
    train(online(job, teacher, output=str(tmp_path / "drawn"), source={"sequences": {"temperature": 1e-6}}))
    checkpoint, units = load_checkpoint(teacher), load_checkpoint(teacher).units
    settings = online(job, teacher)
    stream = PhaseStream(settings, 0, units)
    batch = next(filter(None, stream.batches(stream.start(), 0)))
    assert batch.clean is not None
    batch.parts |= answer({teacher: checkpoint.model}, batch, stream.lessons[0])
    drawing = SourceSettings(audio="memory", teacher=teacher, soft=1.0, sequences={"temperature": 1e-6})  # type: ignore[arg-type]
    task = Task(units, settings.features, settings.model, settings.missing_mass)
    prepare_answers(batch, lesson_of(drawing, task).kinds)
    ids, sizes, _ = batch.parts["sequences"]
    rows = [clean[:size].numpy() for clean, size in zip(batch.clean, batch.lengths, strict=True)]
    greedy = [
        [int(unit) for unit in row.argmax(1).unique_consecutive() if unit] for row in log_posteriors(checkpoint, rows)
    ]
    assert sizes is not None
    assert [one.tolist() for one in ids.split(sizes.tolist())] == greedy
    assert all(map(np.isfinite, losses(tmp_path / "drawn")))


@pytest.mark.parametrize("mode", ["mean", "log_mean", "confidence", "surest"])
def test_several_answer_as_their_stored_targets_are_combined(
    teacher: str, letters: Path, tmp_path: Path, mode: Any
) -> None:
    units, kind = load_units(letters), ModelSettings(layers=1, size=6)
    torch.manual_seed(7)
    save_checkpoint(tmp_path / "other", build_model(kind, FEATURES.dimension, units.size), units, FEATURES, kind)
    both = [load_checkpoint(teacher), load_checkpoint(tmp_path / "other")]
    features, lengths = torch.randn(1, 9, FEATURES.dimension), torch.tensor([9])
    batch = Batch(features, lengths, torch.tensor([0]), lengths, 0, clean=features)
    source = SourceSettings(
        audio="memory", teacher=["a", "b"], soft=1.0, combine=CombineSettings(mode=mode, weights=[1.0, 3.0])
    )
    parts = answer({"a": both[0].model, "b": both[1].model}, batch, Lesson(source, [Taps("layer.1")]))
    dense = torch.zeros(9, units.size).scatter_(1, parts["soft.units"].values, parts["soft.probs"].values)
    targets = [SparsePosteriors.from_dense(log_posteriors(one, [features[0].numpy()])[0], units.size) for one in both]
    together = combine(targets, mode, [1.0, 3.0])
    expected = torch.zeros(9, units.size, dtype=torch.float64)
    expected[torch.from_numpy(together.rows), torch.from_numpy(together.units).long()] = (
        torch.from_numpy(together.log_probs).double().exp()
    )
    torch.testing.assert_close(dense.double(), expected, atol=1e-5, rtol=1e-4)
    hidden = [one.model(features, lengths, ["layer.1"]).hidden["layer.1"][0] for one in both]
    torch.testing.assert_close(parts["hidden.layer.1"].values, torch.cat(hidden, -1))
    assert taught_by(source.model_copy(update={"teacher": [teacher, str(tmp_path / "other")]}), kind) == {"layer.1": 26}


class Taps(Knowledge):
    """A kind that asks for a hidden state of who answers."""

    def __init__(self, *taught: str) -> None:
        self.taught = taught


def test_both_are_divided_by_the_temperature(job: Job, teacher: str, units: Units) -> None:
    settings = online(job, teacher, source={"temperature": {"start": 3.0, "end": 1.0}})
    stream = PhaseStream(settings, 0, units)
    batch = next(filter(None, stream.batches(stream.start(), 0)))
    batch.parts |= answer({teacher: load_checkpoint(teacher).model}, batch, stream.lessons[0], done=0.5)
    logits = torch.randn(*batch.features.shape[:2], units.size, dtype=torch.float64)
    seen = Seen(logits, batch.lengths, batch.learned, batch.parts, {}, {}, done=0.5)
    loss = stream.lessons[0].kinds[0].loss(seen)
    assert batch.clean is not None
    theirs = load_checkpoint(teacher).model(batch.clean, batch.lengths).logits[batch.learned].double()
    expected = -4 * ((theirs / 2).softmax(-1) * (seen.rows / 2).log_softmax(-1)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_schedule_that_stays_is_a_number_and_one_that_moves_is_resumed(
    job: Job, teacher: str, tmp_path: Path, resumed: Callable[..., None]
) -> None:
    def settings(name: str, soft: Any) -> TrainSettings:
        source = {"soft": soft, "temperature": {"start": 2.0, "end": 1.0, "shape": "cosine"}, "sequences": None}
        return online(job, teacher, output=str(tmp_path / name), source=source)

    train(settings("number", 0.5))
    train(settings("constant", {"start": 0.5, "end": 0.5}))
    assert state(tmp_path / "number") == state(tmp_path / "constant")
    train(settings("moving", {"start": 1.0, "end": 0.0, "until": 0.5}))
    assert losses(tmp_path / "moving")[-1] == 0.0 < losses(tmp_path / "moving")[0]
    resumed(settings("again", {"start": 1.0, "end": 0.0, "until": 0.5}))
    assert state(tmp_path / "again") == state(tmp_path / "moving")


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 2.5), ("cosine", 1 + 2 * 3 * (1 - math.cos(math.pi / 4)) / 4)]
)
def test_what_a_schedule_is_at_a_time(shape: Any, middle: float) -> None:
    schedule = ScheduleSettings(start=1.0, end=4.0, until=0.5, shape=shape)
    assert value_at(schedule, 0.0) == 1.0 and value_at(schedule, 0.5) == value_at(schedule, 1.0) == 4.0
    assert value_at(schedule, 0.25 if shape == "linear" else 0.125) == pytest.approx(middle)


def test_the_average_that_answers_first_in_a_phase_is_of_the_weights_it_begins_with(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = online(job, "average", output=str(tmp_path / "run"), ema_decay=0.9, source={"ctc": 1.0})
    settings = settings.model_copy(update={"phases": settings.phases * 2})
    apart: dict[int, float] = {}
    real = phase.step

    def step(learner: Any, *arguments: Any) -> float:
        now, average = learner.pupil.state_dict(), learner.average.module.state_dict()
        apart.setdefault(learner.position.phase, max(float((now[name] - average[name]).abs().max()) for name in now))
        return real(learner, *arguments)

    monkeypatch.setattr(phase, "step", step)
    train(settings)
    assert apart == {0: 0.0, 1: 0.0}


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
    batch = Batch(features, lengths, torch.tensor([1, 0]), torch.tensor([6, 4]), 0, clean=features)
    source = SourceSettings(audio="memory", teacher=teacher, soft=1.0)
    parts = answer({teacher: checkpoint.model.train()}, batch, Lesson(source, []))
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
    job: Job, teacher: str, tmp_path: Path, resumed: Callable[..., None], who: str
) -> None:
    def settings(name: str) -> TrainSettings:
        teaching = teacher if who == "checkpoint" else "average"
        return online(
            job, teaching, output=str(tmp_path / name), ema_decay=0.8, source={"ctc": 0.5, "augment": {"time_masks": 1}}
        )

    train(settings("whole"))
    resumed(settings("run"))
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
    settings = online(
        job, teacher if who == "checkpoint" else "average", lanes=2, ema_decay=0.5,
        phase={"passes": 3}, batch_frames=60, bucket_utterances=3,
    )  # fmt: skip
    assert_a_death_changes_nothing(settings, tmp_path)


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
        ({"ctc": 1.0, "ctc_within_targets": True}, "ctc_within_targets learns from stored targets alone"),
        ({"teacher": ["one", "one"]}, "teacher names one twice"),
        ({"combine": {"mode": "log_mean"}}, "combine needs a list of two or more targets"),
        ({"temperature": {"start": 2.0, "end": 0.0}}, "temperature must be above 0"),
        ({"teacher": None, "targets": "somewhere", "temperature": 2.0}, "temperature needs a teacher in the step"),
        (
            {"spikes": {}, "temperature": 2.0},
            "temperature is for soft targets that are learned frame by frame; leave it out with spikes",
        ),
        ({"teacher": ["average", "other"], "guard": 0.5}, "guard watches teacher: average, alone"),
        (
            {"teacher": "cycle", "mutual": {}},
            "mutual needs an answer in every batch, and with cycle there are some without",
        ),
        (
            {"teacher": "average", "guard": 0.5, "branches": {}},
            "branches needs an answer in every batch, and with guard",
        ),
        ({"soft": 0.0, "teacher": None, "views": {}, "augment": {"time_masks": 1}}, "ends in silence"),
        ({"soft": 0.0, "teacher": None, "heads": [{"layer": "layer.1", "top": 1.0}]}, "ends in silence"),
        ({"soft": 0.0, "ctc": 1.0}, "nothing is learned from teacher; set soft above 0"),
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


def test_of_two_teachers_the_one_of_another_frame_period_is_named(
    job: Job, teacher: str, letters: Path, tmp_path: Path
) -> None:
    units, kind, slow = load_units(letters), ModelSettings(layers=1, size=6), FEATURES.model_copy(update={"stack": 4})
    save_checkpoint(tmp_path / "slow", build_model(kind, slow.dimension, units.size), units, slow, kind)
    message = rf"teacher: {tmp_path / 'slow'} hears other features than this run; .* label the audio and learn the targets with resample=true"
    with pytest.raises(UserError, match=message):
        train(online(job, "", source={"teacher": [teacher, str(tmp_path / "slow")]}))
