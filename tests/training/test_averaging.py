from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from asr_kd.audio.settings import FeatureSettings
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training.averaging import Choice, Scored, chosen, folder_of, mean_of, remove_others
from asr_kd.training.settings import AverageSettings
from asr_kd.units import Units

SCORES = [Scored(1, 0.9, 3.0), Scored(2, 0.5, 2.0), Scored(3, 0.5, 1.0), Scored(4, 0.7, 0.5), Scored(5, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("wanted", "steps"), [({"last": 2}, [4, 5]), ({"best": 2}, [3, 5]), ({"best": 3}, [2, 3, 5]), ({"last": 9}, [1, 2, 3, 4, 5])]
)  # fmt: skip
def test_one_at_a_time_the_same_as_all_at_once(wanted: dict[str, int], steps: list[int]) -> None:
    settings, kept = AverageSettings(**wanted), []
    for score in SCORES:
        kept = chosen(settings, [*kept, score], "wer")
    assert [one.step for one in kept] == steps
    assert chosen(settings, SCORES, "wer") == kept


@pytest.mark.parametrize(("choose", "steps"), [("wer", [3, 5]), ("loss", [3, 4]), ("both", [4, 5])])
def test_the_score_that_chooses_is_a_setting(choose: Choice, steps: list[int]) -> None:
    scores = [Scored(1, 0.4, 3.0), Scored(2, 0.3, 2.5), Scored(3, 0.2, 0.5), Scored(4, 0.25, 0.3), Scored(5, 0.15, 0.6)]
    assert [one.step for one in chosen(AverageSettings(best=2), scores, choose)] == steps


def test_where_a_score_is_nothing_the_words_decide_and_then_the_loss() -> None:
    right, surer, sure_and_wrong = Scored(1, 0.0, 0.3), Scored(2, 0.0, 0.2), Scored(3, 0.1, 0.0)
    assert sorted([sure_and_wrong, right, surer], key=lambda one: one.rank("both")) == [surer, right, sure_and_wrong]
    silent, learning = Scored(1, 1.0, 3.0), Scored(2, 1.0, 2.0)
    assert all(learning.rank(choose) < silent.rank(choose) for choose in ("wer", "loss", "both"))


def test_last_or_best_and_more_than_one() -> None:
    for wrong in ({}, {"last": 2, "best": 2}, {"last": 1}):
        with pytest.raises(ValidationError):
            AverageSettings(**wrong)


def test_mean_of_weights_and_running_statistics(tmp_path: Path, units: Units) -> None:
    features, settings = FeatureSettings(mels=8), ModelSettings(kind="conformer", layers=1, size=8, heads=2)
    expected: dict[str, torch.Tensor] = {}
    for step in range(3):
        torch.manual_seed(step)
        model = build_model(settings, features.dimension, units.size)
        model.train()
        model(torch.randn(2, 20, features.dimension), torch.tensor([20, 15]))  # moves the running statistics
        save_checkpoint(folder_of(tmp_path, Scored(step, 0.0, 0.0)), model, units, features, settings)
        for name, value in model.state_dict().items():
            expected[name] = expected.get(name, torch.zeros(())) + value / 3
    mean = mean_of([folder_of(tmp_path, Scored(step, 0.0, 0.0)) for step in range(3)]).state_dict()
    assert any("running_mean" in name for name in mean)
    for name, value in mean.items():
        torch.testing.assert_close(value.float(), expected[name], rtol=1e-4, atol=1e-6)


def test_only_others_are_removed(tmp_path: Path) -> None:
    for score in SCORES:
        folder_of(tmp_path, score).mkdir(parents=True)
    remove_others(tmp_path, SCORES[2:4])
    assert {path.name for path in tmp_path.rglob("*") if path.name.isdigit()} == {"3", "4"}
    remove_others(tmp_path / "elsewhere", SCORES)
