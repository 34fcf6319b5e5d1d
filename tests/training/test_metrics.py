from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asr_kd import loggers
from asr_kd.errors import UserError
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from tests.kept import Kept

Job = Callable[..., TrainSettings]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a logger called `kept` is told."""
    monkeypatch.setitem(loggers.OWN, "kept", Kept)
    monkeypatch.setattr(loggers, "is_installed", lambda _: True)
    monkeypatch.setattr(Kept, "told", [])
    return Kept.told


def test_a_run_tells_its_loggers_what_it_writes(
    job: Job, audio: str, targets: str, told: list[tuple[Any, ...]], resumed: Callable[..., None]
) -> None:
    sources = [{"audio": audio, "targets": targets, "soft": weight} for weight in (1.0, 0.5)]
    settings = job(phase={"sources": sources}, log=["kept"])
    resumed(settings)
    train(job(phase={"sources": sources}))  # is done: who is told does not make it another run
    (_, first), (_, second) = (one for one in told if one[0] == "start")
    assert (first["verb"], first["output"], first["step"]) == ("train", settings.output, -1)
    assert second["step"] > 0 and "log" not in first["settings"] and first["settings"]["seed"] == 0
    assert [one[1] for one in told if one[0] == "end"] == ["stopped", "done"]

    last = {step: values for what, step, *rest in told if what == "scalars" for values in rest if "loss" in values}
    lines = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert {line["source"] for line in steps} == {0, 1}
    for line in steps:
        assert line["gradient_norm"] > 0
        values = last[line["step"]]
        assert values[f"loss/phases.0.sources.{line['source']}"] == values["loss"] == line["loss"]
        assert values["gradient_norm"] == line["gradient_norm"] and "source" not in values


def test_an_unknown_logger_is_refused_before_anything_is_written(job: Job) -> None:
    settings = job(log=["tensorbord"])
    with pytest.raises(UserError, match="log: tensorbord is no logger"):
        train(settings)
    assert not Path(settings.output).exists()


def test_tensorboard_that_nobody_asked_for_may_be_missing(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asr_kd.training.trainer.is_installed", lambda _: False)
    train(job(tensorboard=True, phase={"passes": 1}))
    assert "TensorBoard is not installed" in capsys.readouterr().err
