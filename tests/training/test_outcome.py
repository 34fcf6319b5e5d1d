from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asr_kd.models.origin import won_nothing
from asr_kd.training.averaging import Scored
from asr_kd.training.development import Development
from asr_kd.training.outcome import concluded, phase_lost, run_lost, said_of
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Position

Job = Callable[..., TrainSettings]
START = Scored(0, 0.392, 0.32, 58, 15)


def at(step: int, best: Scored, last: Scored, lowest: float, **more: Any) -> Position:
    return Position(step=step, start=START, best=best, last=last, lowest=lowest, **more)


@pytest.mark.parametrize(
    ("last", "lowest", "choose", "reason"),
    [
        (Scored(90, 0.42, 0.20, 87, 13), 0.2, "wer",
         "the loss fell though the WER did not and deletions rose from 58 to 87; try choose: both, choose: loss or more passes"),
        (Scored(90, 0.80, 0.20, 58, 13), 0.2, "both", "the loss fell though the WER did not; try choose: loss or more passes"),
        (Scored(90, 0.42, 0.40, 87, 13), 0.3, "both", "the loss fell to 0.3 and rose again; try a lower learning_rate or fewer passes"),
        (Scored(90, 0.42, 0.40, 87, 13), 0.33, "both",
         "the loss was never below the start's, so the learning rate may be too high or the targets worse than what the start "
         "knows; try a lower learning_rate"),
        (Scored(90, 0.38, 0.40, 87, 13), 0.33, "loss",
         "though the WER fell, the loss was never below the start's, so the learning rate may be too high or the targets worse "
         "than what the start knows; try a lower learning_rate, or choose: wer"),
    ],
)  # fmt: skip
def test_the_figures_and_what_they_hint_at(job: Job, last: Scored, lowest: float, choose: str, reason: str) -> None:
    settings = job(init="runs/y", choose=choose)
    assert run_lost(at(90, START, last, lowest), settings) == (
        "no checkpoint was better than runs/y, where it started (development WER 39.2 %, loss 0.32): best/ holds the start. "
        f"The last weights have development WER {100 * last.wer:.1f} %, loss {last.loss:.3g}: {reason}."
    )


def test_nothing_is_said_of_a_run_that_won(job: Job) -> None:
    settings, won = job(init="runs/y"), Scored(60, 0.3, 0.3)
    position = at(90, won, Scored(90, 0.4, 0.2), 0.2, finished=True)
    assert run_lost(position, settings) is None
    assert concluded(position, settings).endswith("90 steps over 0.0 audio hours, best development WER 30.00%")


def test_fresh_weights_that_stay_the_best_are_named(job: Job) -> None:
    said = run_lost(at(90, START, Scored(90, 0.9, 0.4), 0.4), job())
    assert said is not None and said.startswith("no checkpoint was better than the fresh weights, where it started")


def test_what_a_phase_threw_away(job: Job) -> None:
    phase = job().phases[0].model_dump()
    one, two = job(), job(phases=[phase, phase])
    lost = at(90, Scored(40, 0.3, 0.3), Scored(90, 0.4, 0.2), 0.2, phase_start=50)
    said = phase_lost(lost, two, 0)
    assert (
        said is not None
        and "step 90 (development WER 40.0 %, loss 0.2), are thrown away, and the next phase begins" in said
    )
    lost.finished = True
    said = phase_lost(lost, two, 1)
    assert said is not None and said.startswith("phase 2 of 2") and "and best/ holds those of step 40" in said
    assert phase_lost(lost, one, 0) is None, "of one phase the run says it"
    won = at(90, Scored(70, 0.3, 0.3), Scored(90, 0.4, 0.2), 0.2, phase_start=50)
    assert phase_lost(won, two, 0) is None
    assert phase_lost(at(90, START, Scored(90, 0.4, 0.4), 0.4, phase_start=50, finished=True), two, 1) is None


def test_a_checkpoint_says_what_it_started_from(job: Job) -> None:
    settings, scores = job(init="runs/y"), Development(0.392, 0.32, 1.5, 3, 2, 1, 0.8)
    said = said_of(Position(start=START), settings, scores)
    assert said["started_from"] == {"folder": "runs/y", "wer": 0.392, "loss": 0.32, "won": False}
    assert (said["blank_offset"], said["development_deletions"], said["development_loss"]) == (1.5, 2, 0.32)
    assert won_nothing(said) == (
        "no checkpoint was better than runs/y, where it started (development WER 39.2 %, loss 0.32)"
    )
    later = said_of(Position(step=1, start=START), settings, scores)
    assert later["started_from"]["won"] is True and won_nothing(later) is None
    assert "started_from" not in said_of(Position(start=START), job(), scores)


@pytest.mark.parametrize(
    "training", [{}, {"started_from": None}, {"started_from": {"won": False}}, {"started_from": [1]}]
)
def test_a_checkpoint_of_another_making_says_nothing(training: dict[str, Any]) -> None:
    assert won_nothing(training) is None
