"""Separate runs that teach each other by what they share: the same bits whoever is first, waits, or dies and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.load import build
from asr_kd.ending import Stopped
from asr_kd.errors import UserError
from asr_kd.files import write_json
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training import codistillation, phase
from asr_kd.training.codistillation import hear
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.learning import learner_of
from tests.training.conftest import FEATURES
from tests.training.test_processes import launched

Job = Callable[..., TrainSettings]

EVERY = 2


def of(job: Job, folder: Path, name: str, teacher: str | None, **changes: Any) -> TrainSettings:
    """A run that shares; with a teacher, it learns from that run beside the text."""
    source: dict[str, Any] = {"targets": None, "soft": 0.0, "ctc": 1.0}
    if teacher:
        source |= {"soft": 1.0, "teacher": {"run": str(folder / teacher), "every": EVERY, "wait": 300.0}}
    return job(
        source=source | changes.pop("source", {}), phase={"passes": changes.pop("passes", 1)}, output=str(folder / name), seed=ord(name[0]),
        share={"every": EVERY}, evaluate_every=5, **changes,
    )  # fmt: skip


def state(run: Path) -> bytes:
    return (run / "last" / "state.safetensors").read_bytes()


def position(run: Path) -> dict[str, Any]:
    with safetensors.safe_open(str(run / "last" / "state.safetensors"), framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["position"])
    return found


def fingerprint(folder: Path) -> str:
    found: str = json.loads((folder / "checkpoint.json").read_text())["fingerprint"]
    return found


def asked_to_stop(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_learns_from_what_the_other_was_and_goes_on_to_the_same_bits(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(of(job, tmp_path, "a", None, passes=2))
    shared = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "a" / "shared").glob("step-*"))
    assert shared == list(range(EVERY, position(tmp_path / "a")["step"] + 1, EVERY))
    loaded: list[str] = []
    real = codistillation.load_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(codistillation, "load_checkpoint", lambda *one: loaded.append(one[0].name) or real(*one))
        train(of(job, tmp_path, "b", "a", source={"ctc": 0.0}, passes=2))
    steps = position(tmp_path / "b")["step"]
    wanted = range(EVERY, (steps - 1) // EVERY * EVERY, EVERY)  # the last is for the stretch of the last step
    assert loaded == [f"step-{min(step, shared[-1])}" for step in wanted] and len(loaded) > 2
    rows = map(json.loads, (tmp_path / "b" / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[: 2 * EVERY] == [0.0] * 2 * EVERY and all(loss > 0 for loss in losses[2 * EVERY :])
    (name, held), *others = position(tmp_path / "b")["heard"].items()
    assert name == str(tmp_path / "a" / "shared") and not others
    assert held == [wanted[-1], fingerprint(tmp_path / "a" / "shared" / loaded[-1])]

    whole = state(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "whole")
    real_step, count = phase.step, iter(range(100))
    monkeypatch.setattr(phase, "step", lambda *one: (next(count) == 4 and asked_to_stop()) or real_step(*one))
    with pytest.raises(Stopped):
        train(of(job, tmp_path, "b", "a", source={"ctc": 0.0}, passes=2))
    train(of(job, tmp_path, "b", "a", source={"ctc": 0.0}, passes=2))
    assert state(tmp_path / "b") == whole


def alternating(runs: list[TrainSettings]) -> None:
    """Each in turn, until it waits for another, and stops."""
    waiting = list(runs)
    for _ in range(50):
        if not waiting:
            return
        try:
            train(waiting[0])
        except Stopped:
            waiting.append(waiting[0])
        del waiting[0]
    raise AssertionError("they wait for each other for ever")


def test_whoever_begins_and_whoever_waits(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns, from either of them, and side by side as processes."""
    found, folder = [], tmp_path / "here"

    def pair() -> list[TrainSettings]:
        return [of(job, folder, "a", "b"), of(job, folder, "b", "a", model={"layers": 1, "size": 10})]

    def ended(how: str) -> None:
        found.append({name: state(folder / name) for name in ("a", "b")})
        folder.rename(tmp_path / how)

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "import sys; from asr_kd.training import settings, trainer; "
             "trainer.train(settings.TrainSettings.model_validate_json(sys.argv[1]))", one.model_dump_json()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for one in pair()
    ]  # fmt: skip
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    ended("side by side")
    with monkeypatch.context() as patch:
        patch.setattr(codistillation, "sleep", asked_to_stop)
        alternating(pair())
        ended("a first")
        alternating(pair()[::-1])
        ended("b first")
    assert found[0] == found[1] == found[2]


def test_two_processes_of_which_one_dies(job: Job, tmp_path: Path) -> None:
    """Each of them hears the other run, and the first shares."""
    found = {}
    train(of(job, tmp_path, "a", None))
    for how in ("lives", "dies"):
        settings = of(job, tmp_path, "b", "a", passes=2, lanes=2, batch_frames=60, bucket_utterances=3)
        run = launched(settings, tmp_path, 2, how)
        assert (run / "shared" / "last.json").exists()
        found[how] = state(run)
        run.rename(tmp_path / how)
    assert found["lives"] == found["dies"]


# the second process is asked to stop while both wait
ASKED = """
import os, pkgutil, signal, sys
from asr_kd.ending import Stopped
from asr_kd.training import codistillation, trainer
def sleep(seconds):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
codistillation.sleep = sleep
try:
    trainer.train(pkgutil.resolve_name(sys.argv[3]).model_validate_json(sys.argv[1]))
except Stopped:
    pass
"""


def test_two_processes_that_wait_are_stopped_together(job: Job, tmp_path: Path) -> None:
    waiting = of(job, tmp_path, "b", "a", passes=2, lanes=2, batch_frames=60, bucket_utterances=3)
    launched(waiting, tmp_path, 2, job=ASKED)
    train(of(job, tmp_path, "a", None))
    ended = launched(waiting, tmp_path, 2)
    found = state(ended)
    ended.rename(tmp_path / "stopped")
    assert state(launched(waiting, tmp_path, 2)) == found


def learner_at(job: Job, tmp_path: Path, units: Units, step: int, wait: float = 0.01) -> Learner:
    teacher = {"run": str(tmp_path / "other"), "every": EVERY, "wait": wait}
    settings = job(source={"targets": None, "teacher": teacher})
    learner = learner_of(settings, build_model(settings.model, FEATURES.dimension, units.size))
    learner.position.step = step
    return learner


def leave(tmp_path: Path, units: Units, step: int, seed: int = 0, features: FeatureSettings = FEATURES) -> str:
    torch.manual_seed(seed)
    kind = ModelSettings(layers=1, size=6)
    network = build_model(kind, features.dimension, units.size)
    return save_checkpoint(tmp_path / "other" / "shared" / f"step-{step}", network, units, features, kind)


def heard(learner: Learner, units: Units, stop: int = 0) -> bool:
    return hear(learner, learner.settings.phases[0], units, lambda: stop)


def test_one_that_does_not_come_is_named(job: Job, tmp_path: Path, units: Units) -> None:
    learner = learner_at(job, tmp_path, units, 3 * EVERY)
    with pytest.raises(
        UserError, match=r"other/shared/step-4 has not come in 0\.01 s; start that run, with share\.every=2"
    ):
        heard(learner, units)
    assert not heard(learner, units, stop=15) and not learner.teachers


def test_one_that_ended_before_it_shared_is_not_waited_for(job: Job, tmp_path: Path, units: Units) -> None:
    learner = learner_at(job, tmp_path, units, 3 * EVERY)
    write_json(tmp_path / "other" / "shared" / "last.json", {"step": 0})
    with pytest.raises(UserError, match="has ended before it shared anything; train it longer"):
        heard(learner, units)


def test_before_anything_can_be_there_nobody_waits(job: Job, tmp_path: Path, units: Units) -> None:
    for step in range(2 * EVERY):
        learner = learner_at(job, tmp_path, units, step)
        assert heard(learner, units) and not learner.teachers and not learner.position.heard


def test_one_that_has_ended_teaches_by_its_last(job: Job, tmp_path: Path, units: Units) -> None:
    learner, mark = learner_at(job, tmp_path, units, 9 * EVERY), leave(tmp_path, units, EVERY)
    write_json(tmp_path / "other" / "shared" / "last.json", {"step": EVERY})
    assert heard(learner, units)
    assert learner.position.heard == {str(tmp_path / "other" / "shared"): [8 * EVERY, mark]}


def test_another_in_its_place_is_noticed(job: Job, tmp_path: Path, units: Units) -> None:
    learner = learner_at(job, tmp_path, units, 2 * EVERY)
    leave(tmp_path, units, EVERY, seed=1)
    assert heard(learner, units)
    leave(tmp_path, units, EVERY, seed=2)
    learner.position.step += 1
    assert heard(learner, units)  # it is loaded once a stretch
    learner.teachers = {}  # as after a resume
    with pytest.raises(UserError, match="is not what this run has learned from before"):
        heard(learner, units)


def test_one_with_other_features_is_refused(job: Job, tmp_path: Path, units: Units) -> None:
    leave(tmp_path, units, EVERY, features=FEATURES.model_copy(update={"mels": FEATURES.mels + 1}))
    with pytest.raises(UserError, match="hears other features than this run"):
        heard(learner_at(job, tmp_path, units, 2 * EVERY), units)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ({"mutual": {}}, {}, "mutual needs an answer in every batch, and with another run"),
        ({}, {"distributed": {"method": "bmuf"}}, r"need distributed\.method=ddp"),
        ({}, {"phase": {"chunks": {"frames": 5, "carry": True}}}, r"chunks\.carry cannot learn from another run"),
        ({"teacher": [{"run": "x"}, {"run": "x", "every": 3}]}, {}, "teacher names x/shared twice"),
    ],
)
def test_what_does_not_go_together(job: Job, source: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(source={"targets": None, "teacher": {"run": "x"}, **source}, **changes)


def test_the_same_run_is_asked_for_in_one_way(job: Job) -> None:
    source = job(source={"targets": None, "teacher": {"run": "x"}}).phases[0].sources[0].model_dump()
    with pytest.raises(ValueError, match="teacher: x is asked for in two ways"):
        job(phase={"sources": [source, source | {"teacher": {"run": "x", "every": 3}}]})


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"run": "x", "evry": 3}, r"unknown key phases\.0\.sources\.0\.teacher\.evry; did you mean every\?"),
        ([{"run": "x", "every": 0}], r"phases\.0\.sources\.0\.teacher\.0\.every: input should be greater"),
        (3, r"phases\.0\.sources\.0\.teacher: input should be a valid string"),
    ],
)
def test_mistakes_are_named_by_the_key_alone(job: Job, teacher: Any, message: str) -> None:
    values = job().model_dump()
    values["phases"][0]["sources"][0] |= {"targets": None, "teacher": teacher}
    with pytest.raises(UserError, match=message):
        build(TrainSettings, values, "file")


def test_the_list_of_teachers_may_mix_runs_and_checkpoints(job: Job, tmp_path: Path) -> None:
    source = job(source={"targets": None, "teacher": ["average", {"run": "x/"}]}, ema_decay=0.5).phases[0].sources[0]
    assert source.teachers == ["average", "x/shared"] and [one.run for one in source.runs] == ["x/"]
