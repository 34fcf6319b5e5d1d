from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from asr_kd import cli
from asr_kd.doctor import machine, trial
from asr_kd.doctor.job import doctor
from asr_kd.doctor.settings import DoctorSettings
from asr_kd.ending import Status, Stopped
from asr_kd.errors import UserError

Capture = pytest.CaptureFixture[str]


def test_all_jobs_run_and_nothing_private_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "somebodys")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "device=cpu", "details=true"]) == Status.DONE
    text = capsys.readouterr().out
    found = json.loads(text)
    assert [one["step"] for one in found["test"]] == ["prepare", "label", "read targets", "train", "transcribe"]
    assert not any(one["problem"] for one in found["test"]) and found["problems"] == []
    assert found["packages"]["torch"] and found["packages"]["libsndfile"] and "s3fs" in found["extras"]["s3"]
    assert found["cpu"]["cores"] >= found["cpu"]["usable"] > 0 and found["torch"]["threads"] > 0
    assert "somebody" not in text
    assert list(tmp_path.iterdir()) == [], "the folder is left as it was"


def test_as_text_it_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("soxr", "ray"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert not doctor(DoctorSettings(test=False))
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert ["wrong", "soxr is not installed"] in lines
    assert any(rest.endswith("ray is missing; pip install 'asr-kd[ray]'") for _, rest in lines)
    assert [name for name, _ in lines].count("wrong") == 1, "an extra that is missing is no mistake"


def test_the_first_step_that_fails_is_the_last(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken(folder: Path, _: str) -> None:
        print("nobody needs to see this")
        raise RuntimeError(f"of {folder}:\n no such instruction")

    monkeypatch.setattr(trial, "STEPS", {"first": lambda *_: None, "second": broken, "third": broken})
    assert cli.main(["doctor"]) == Status.DOES_NOT_HOLD
    printed = capsys.readouterr().out
    assert "test: second" in printed and "RuntimeError: of …: no such instruction" in printed
    assert "third" not in printed and "nobody" not in printed


def test_a_stop_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise Stopped("stopped", Status.TERMINATED)

    monkeypatch.setattr(trial, "STEPS", {"train": stopped})
    assert cli.main(["doctor"]) == Status.TERMINATED


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for folder in ("file", "file/runs"):
        assert cli.main(["doctor", "test=false", f"folder={folder}"]) == Status.DOES_NOT_HOLD
        assert f"{folder}: cannot be written (Not a directory)" in capsys.readouterr().out
    monkeypatch.setattr(machine, "create", lambda *_: True)  # of a file system that knows no links
    assert "links do not work" in machine.folder_found(".")["problem"]


def test_a_folder_that_jobs_will_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = machine.folder_found("runs/new")
    assert found["path"] == "runs/new" and found["size"] >= found["free"] > 0 and "problem" not in found
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchaudio", None)
    assert not doctor(DoctorSettings(test=False))
    assert "torch cannot be loaded" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "limit"), [("max\n", None), ("1000\n", 1000), ("9223372036854771712\n", None)])
def test_the_memory_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, limit: int | None
) -> None:
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(machine, "LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
    assert machine.cpu()["memory_limit"] == limit


def test_a_user_error_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise UserError("device: cuda is not on this machine")

    monkeypatch.setattr(trial, "STEPS", {"train": refused})
    assert trial.trial("cuda")[0]["problem"] == "device: cuda is not on this machine"


def test_no_training_waits_for_others_where_torchrun_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen: list[str | None] = []
    monkeypatch.setattr(trial, "STEPS", {"look": lambda *_: seen.append(os.environ.get("WORLD_SIZE"))})
    assert trial.trial("cpu")[0]["problem"] is None
    assert seen == [None] and os.environ["WORLD_SIZE"] == "2"


def test_without_a_temporary_folder_the_rest_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def none(*_: object, **__: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", none)
    assert cli.main(["doctor"]) == Status.DOES_NOT_HOLD
    out = capsys.readouterr().out
    assert "temporary folder: No usable temporary directory found" in out and "CPU" in out
