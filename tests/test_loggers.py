from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asr_kd import loggers
from asr_kd.ending import Status, Stopped
from asr_kd.errors import UserError
from asr_kd.loggers import GROUP, Loggers
from tests.kept import Kept

Offer = Any


class Failing(Kept):
    """Fails as soon as there are figures."""

    def scalars(self, *_: Any) -> None:
        raise ConnectionError("no network")


class Unmade:
    def __init__(self) -> None:
        raise ImportError("no such package")


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another package offers loggers by entry points."""
    there = [
        importlib.metadata.EntryPoint(name, f"asr_kd_others:{kind.__name__}", GROUP)
        for name, kind in {"kept": Kept, "failing": Failing, "unmade": Unmade}.items()
    ]
    module = types.ModuleType("asr_kd_others")
    module.Kept, module.Failing, module.Unmade = Kept, Failing, Unmade  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "asr_kd_others", module)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **asked: [one for one in there if one.group == asked["group"]])  # fmt: skip
    Kept.told = []
    yield


def test_what_is_offered_by_an_entry_point_is_told_everything(offered: None) -> None:
    with Loggers(["kept", "kept"]) as told:
        told.start("label", Path("targets"), {"k": 20}, step=7)
        told.scalars(8, {"loss": 0.5})
    assert Kept.told == [
        ("start", {"verb": "label", "output": "targets", "settings": {"k": 20}, "step": 7}),
        ("scalars", 8, {"loss": 0.5}),
        ("end", "done"),
    ]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Stopped("asked", Status.TERMINATED), "stopped"), (KeyboardInterrupt(), "stopped"), (UserError("bad"), "failed")],
)
def test_the_end_is_told(offered: None, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), Loggers(["kept"]):
        raise error
    assert Kept.told == [("end", status)]


def test_one_that_fails_is_left_out_and_kills_nothing(offered: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Loggers(["failing", "kept"]) as told:
        for step in range(3):
            told.scalars(step, {})
    assert [what for what, *_ in Kept.told] == ["scalars"] * 3 + ["end"], "of the other alone"
    assert capsys.readouterr().err == (
        "log: failing fails (ConnectionError('no network')) and is left out from here on; the job goes on\n"
    )


def test_mistakes_are_told_before_anything_runs(offered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="log: tensorbord is no logger; there are failing, kept, mlflow, tensorboard"):
        Loggers(["tensorbord"])
    with pytest.raises(UserError, match=r"log: unmade \(asr_kd_others:Unmade\) cannot be made: ImportError"):
        Loggers(["unmade"])
    monkeypatch.setattr(loggers, "is_installed", lambda _: False)
    with pytest.raises(UserError, match=r"log: wandb is not installed; run `pip install 'asr-kd\[wandb\]'`"):
        Loggers(["wandb"])


def test_tensorboard_has_figures_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # Files are read in the order of their names: the second, then a count, of which 10 stands before 9. A job goes on in a later second.
    clock = types.SimpleNamespace(time=itertools.count(1_000_000_000).__next__)
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)
    with Loggers(["tensorboard"]) as told:
        told.start("train", tmp_path, {"seed": 5})
        for step in (1, 2):
            told.scalars(step, {"loss": 1.0 / step, "loss/phases.0.sources.1": 1.0 / step})
    with Loggers(["tensorboard"]) as told:  # goes on behind step 1
        told.start("train", tmp_path, {"seed": 5}, step=1)
        told.scalars(2, {"loss": 0.25})
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(1, 1.0), (2, 0.25)]
    assert "loss/phases.0.sources.1" in found.Tags()["scalars"]
    (said, *_) = found.Tensors("settings/text_summary")
    assert '"seed": 5' in said.tensor_proto.string_val[0].decode()


def test_adapters_call_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As their documentation has it: `wandb.init`, `Run.log`, `Run.finish`; `mlflow.start_run`, `log_dict`, `log_metrics`, `end_run`."""
    calls: list[tuple[str, Any]] = []

    def recorded(name: str) -> Any:
        return lambda *words, **options: calls.append((name, json.loads(json.dumps([*words, options]))))

    run = types.SimpleNamespace(log=recorded("log"), finish=recorded("finish"))
    wandb = types.SimpleNamespace(init=lambda **options: recorded("init")(**options) or run)
    mlflow = types.SimpleNamespace(**{name: recorded(name) for name in ("start_run", "log_dict", "log_metrics", "end_run")})  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(loggers, "is_installed", lambda _: True)
    with pytest.raises(UserError, match="bad"), Loggers(["wandb", "mlflow"]) as told:
        told.start("train", "runs/student", {"seed": 5})
        told.scalars(3, {"loss": 0.5})
        raise UserError("bad")
    config = {"verb": "train", "output": "runs/student", "settings": {"seed": 5}, "step": -1}
    assert calls == [
        ("init", [{"project": "asr_kd", "name": "student", "job_type": "train", "config": config}]),
        ("start_run", [{"run_name": "train runs/student"}]),
        ("log_dict", [config, "config.json", {}]),
        ("log", [{"step": 3, "loss": 0.5}, {}]),
        ("log_metrics", [{"loss": 0.5}, {"step": 3}]),
        ("finish", [{"exit_code": 1}]),
        ("end_run", ["FAILED", {}]),
    ]
