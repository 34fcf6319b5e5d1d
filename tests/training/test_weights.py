"""Weights of several teachers by their development WER: the rule, where the scores are from, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.training.weights import weights_of, with_weights
from asr_kd.units import load_units
from tests.training.conftest import FEATURES

Job = Callable[..., TrainSettings]
RATES = st.lists(st.floats(0.0, 3.0), min_size=1, max_size=6)


@given(RATES)
def test_weights_add_up_to_one_and_fall_with_the_error_rate(rates: list[float]) -> None:
    found = weights_of(rates)
    assert sum(found) == pytest.approx(1.0) and min(found) > 0
    ordered = [weight for _, weight in sorted(zip(rates, found, strict=True), key=lambda pair: pair[0])]
    assert ordered == sorted(ordered, reverse=True)


def test_half_the_errors_count_twice_and_equal_ones_alike() -> None:
    assert weights_of([0.05, 0.1]) == pytest.approx([2 / 3, 1 / 3])
    assert weights_of([0.2, 0.2, 0.2, 0.2]) == [0.25] * 4
    assert weights_of([0.0, 0.001]) == [0.5, 0.5], "no error and one in a thousand words are told apart by nothing"
    assert weights_of([0.0, 0.1]) == pytest.approx([100 / 101, 1 / 101])


@pytest.fixture(scope="module")
def teachers(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A checkpoint that says what it scored; None: it says nothing."""
    units, kind = load_units(letters), ModelSettings(layers=1, size=6)

    def make(seed: int, wer: float | None, development: str = "development") -> str:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("teacher")
        model = build_model(kind, FEATURES.dimension, units.size)
        said = {"development_wer": wer, "settings": {"development": development}}
        save_checkpoint(folder, model, units, FEATURES, kind, said if wer is not None else None)
        return str(folder)

    return make


def labelled(teacher: str, audio: str, folder: Path) -> str:
    label(LabelSettings(teacher=teacher, audio=audio, output=str(folder), device="cpu"))
    return str(folder)


def settings_of(
    job: Job, stored: list[str] | None, teacher: list[str] | None, weights: Any, **changes: Any
) -> TrainSettings:
    source = {"targets": stored, "teacher": teacher, "combine": {"weights": weights}}
    return job(source=source, phase={"passes": 1}, **changes)


def state(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "last" / "state.safetensors")


@pytest.mark.parametrize("stored", [True, False])
def test_a_run_learns_with_the_weights_of_the_scores(
    job: Job, teachers: Callable[..., str], audio: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: bool
) -> None:
    names = [teachers(1, 0.05), teachers(2, 0.1)]
    if stored:
        names = [labelled(name, audio, tmp_path / f"targets{number}") for number, name in enumerate(names)]
    answering = (names, None) if stored else (None, names)
    found = {}
    for name, weights in (("by-score", "development"), ("by-hand", [2 / 3, 1 / 3]), ("alike", None)):
        train(settings_of(job, *answering, weights, output=str(tmp_path / name)))
        found[name] = state(tmp_path / name)
    for name, value in found["by-hand"].items():
        torch.testing.assert_close(found["by-score"][name], value, rtol=1e-4, atol=1e-5)
    name = "model.output.weight"
    assert (found["alike"][name] - found["by-hand"][name]).abs().max() > 1e-3
    said = capsys.readouterr().err
    assert f"{audio}: weights of the teachers: 0.667 {names[0]} (development WER 5.00%), 0.333 {names[1]}" in said
    claim = json.loads((tmp_path / "by-score" / "job.json").read_text())["settings"]
    assert claim["phases"][0]["sources"][0]["combine"]["weights"] == pytest.approx([2 / 3, 1 / 3])
    train(settings_of(job, *answering, "development", output=str(tmp_path / "by-score")))  # finished, and knows it


def test_equal_scores_are_the_plain_mean(job: Job, teachers: Callable[..., str], tmp_path: Path) -> None:
    names = [teachers(1, 0.25), teachers(2, 0.25)]
    for name, weights in (("scored", "development"), ("plain", None)):
        train(settings_of(job, None, names, weights, output=str(tmp_path / name)))
    one, other = (state(tmp_path / name) for name in ("scored", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_label_says_how_its_teacher_did(teachers: Callable[..., str], audio: str, tmp_path: Path) -> None:
    folder = labelled(teachers(1, 0.125, "some/development"), audio, tmp_path / "scored")
    report = json.loads(Path(folder, "report.json").read_text())
    assert report["teacher"] == {"development_wer": 0.125, "development": "some/development"}
    silent = json.loads(Path(labelled(teachers(1, None), audio, tmp_path / "silent"), "report.json").read_text())
    assert "teacher" not in silent and set(silent) == set(report) - {"teacher"}
    shards = [path.read_bytes() for name in ("scored", "silent") for path in sorted((tmp_path / name).glob("*.tar"))]
    assert shards[:3] == shards[3:], "the score is of the folder, and changes no shard"


def test_targets_of_before_there_were_scores_get_theirs_by_labelling_again(
    job: Job, teachers: Callable[..., str], audio: str, tmp_path: Path
) -> None:
    names = [teachers(1, 0.1), teachers(2, 0.3)]
    folders = [labelled(name, audio, tmp_path / f"targets{number}") for number, name in enumerate(names)]
    report = Path(folders[1]) / "report.json"
    said = json.loads(report.read_text())
    del said["teacher"]
    report.write_text(json.dumps(said))
    settings = settings_of(job, folders, None, "development")
    with pytest.raises(
        UserError, match=rf"combine\.weights: {report} does not say how the teacher .* run their `asr-kd label` again"
    ):
        with_weights(settings)
    labelled(names[1], audio, Path(folders[1]))
    weights = with_weights(settings)[0].phases[0].sources[0].combine.weights
    assert weights == pytest.approx([0.75, 0.25])


def test_who_was_not_scored_is_named(job: Job, teachers: Callable[..., str], targets: str, tmp_path: Path) -> None:
    scored, silent, elsewhere = teachers(1, 0.1), teachers(2, None), teachers(3, 0.1, "other/development")
    for asked, message in (
        ([scored, silent], rf"the checkpoint {silent} has no development WER; give weights as numbers"),
        (
            [scored, elsewhere],
            rf"{scored} was scored on development and {elsewhere} on other/development; score them on the same",
        ),
        ([scored, str(tmp_path)], "holds no checkpoint.json"),
    ):
        with pytest.raises(UserError, match=message):
            with_weights(settings_of(job, None, asked, "development"))
    with pytest.raises(UserError, match=rf"{targets}/report\.json does not say how the teacher of these targets did"):
        with_weights(settings_of(job, [targets, str(tmp_path)], None, "development"))


def test_settings_without_it_are_left_as_they_are(job: Job) -> None:
    settings = job()
    assert with_weights(settings) == (settings, [])


@pytest.mark.parametrize("who", ["average", "cycle", {"run": "other/run"}])
def test_who_has_no_score_before_the_run_is_refused(job: Job, who: Any) -> None:
    with pytest.raises(
        ValueError, match=r"development takes scores from before the run|answers alone, and not in the first cycle"
    ):
        settings_of(job, None, ["folder", who], "development", ema_decay=0.5)
