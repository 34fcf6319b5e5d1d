from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_kd import cli, summary
from asr_kd.ending import Status
from asr_kd.summary import SUMMARY, summarised, tell_summary

Capture = pytest.CaptureFixture[str]

#: of every summary, in this order
KEYS = [
    "verb", "status", "exit", "message", "version", "started", "seconds", "output", "utterances", "done", "quarantined", "audio_hours",
    "figures",
]  # fmt: skip
SMALL = ["features={sample_rate: 8000, mels: 8}", "model={layers: 1, size: 8}", "device=cpu", "tensorboard=false"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a manifest of four recordings, of which one is none."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for number in range(4):
        soundfile.write(f"{number}.wav", np.random.default_rng(number).normal(0, 0.1, 8000), 8000)
        lines.append({"audio": f"{number}.wav", "text": ("one two", "two one")[number % 2]})
    Path("3.wav").write_bytes(b"no sound")
    Path("list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def said(file: str | Path) -> dict[str, Any]:
    value = json.loads(Path(file).read_text())
    assert list(value) == KEYS
    assert value["seconds"] >= 0 and value["started"].endswith("+00:00")
    return value


def call(*words: str) -> int:
    return int(cli.main(list(words)))


def test_every_job_on_the_road_says_the_same_things(here: Path) -> None:
    assert call("prepare", "manifest=list.jsonl", "output=audio", "max_bad_share=0.5") == 0
    prepared = said("audio/summary.json")
    assert (prepared["verb"], prepared["status"], prepared["exit"], prepared["message"]) == ("prepare", "done", 0, None)
    assert (prepared["utterances"], prepared["done"], prepared["quarantined"]) == (4, 3, 1)
    assert prepared["output"] == "audio" and prepared["audio_hours"] == pytest.approx(3 / 3600)

    assert call("units", "source=audio", "output=units", "kind=char", "size=20") == 0
    assert said("units/summary.json")["figures"]["units"] > 3
    assert call("lm", "source=audio", "output=text") == 0
    assert said("text/summary.json")["figures"]["words"] == 2

    source = "phases=[{sources: [{audio: audio, ctc: 1.0}], passes: 1}]"
    assert call("train", "output=run", "units=units", "development=audio", source, *SMALL) == 0
    trained = said("run/summary.json")
    assert trained["figures"]["steps"] == 1 and trained["audio_hours"] > 0 and trained["utterances"] is None

    assert call("label", "teacher=run", "audio=audio", "output=targets", "device=cpu") == 0
    labelled = said("targets/summary.json")
    assert (labelled["utterances"], labelled["done"], labelled["quarantined"]) == (3, 3, 0)
    assert labelled["figures"]["frames"] == json.loads(Path("targets/report.json").read_text())["frames"]

    assert call("eval", "systems.run=run", "audio=audio", "output=report", "device=cpu", "bootstrap=0") == 0
    scored = said("report/summary.json")
    assert scored["done"] == 3 and scored["figures"]["systems"]["run"]["words"] == 6

    # a job whose output is a file has no folder for it
    transcribe = ["transcribe", "checkpoint=run", "audio=audio", "output=texts.jsonl", "device=cpu"]
    assert call(*transcribe, "--summary", "said.json") == 0
    assert said("said.json")["output"] == "texts.jsonl" and not list(here.glob("texts*summary*"))


def test_a_failure_is_told_where_it_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = ["prepare", "manifest=list.jsonl", "output=audio"]
    assert call(*strict, "--summary", "said.json") == Status.MISTAKE
    failed = said("said.json")
    assert (failed["status"], failed["exit"]) == ("mistake", 2) and (failed["utterances"], failed["quarantined"]) == (
        4,
        1,
    )
    assert f"asr-kd prepare: {failed['message']}\n" in capsys.readouterr().err
    assert not (here / "audio" / SUMMARY).exists(), "of what is not done"

    assert call(*strict, "max_bad_share=0.5", "--summary", "-") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "done"


def test_a_refused_job_leaves_the_summary_of_another_alone(here: Path) -> None:
    assert call("units", "source=list.jsonl", "output=units", "kind=char", "size=20") == 0
    before = (here / "units" / SUMMARY).read_text()
    assert call("units", "source=list.jsonl", "output=units", "kind=char", "size=19") == Status.MISTAKE
    assert call("lm", "source=list.jsonl", "output=units") == Status.MISTAKE
    assert (here / "units" / SUMMARY).read_text() == before


def test_a_defect_and_a_stop_are_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        tell_summary("units", done=1)
        raise ValueError("a defect")

    monkeypatch.setattr(cli, "_settings", broken)
    with pytest.raises(ValueError, match="a defect"):
        call("units", "--summary", "said.json")
    assert (said("said.json")["status"], said("said.json")["exit"]) == ("defect", 3)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_settings", stopped)
    assert call("units", "--summary", "said.json") == Status.INTERRUPTED
    assert said("said.json")["status"] == "interrupted"
    assert said("said.json")["done"] is None, "the job before is forgotten"


def test_a_job_is_done_though_its_summary_cannot_be_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    units = ["units", "source=list.jsonl", "output=units", "kind=char", "size=20"]
    assert call(*units, "--summary", "list.jsonl/said.json") == 0
    assert capsys.readouterr().err.count("the summary was not written") == 1

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(summary, "write_json", full)
    assert call(*units) == 0
    assert "No space left" in capsys.readouterr().err


def test_of_the_processes_of_torchrun_one_writes(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("RANK", "1")
    call("units", "source=none", "output=units", "--summary", "said.json")
    assert not Path("said.json").exists()
    call("units", "source=none", "output=units", "--summary", "-")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("file", ["job.yaml", "source=list.jsonl", "list.jsonl", "other.json", "s9://x/y.json", ""])
def test_what_is_meant_as_something_else_is_not_overwritten(here: Path, capsys: Capture, file: str) -> None:
    Path("job.yaml").write_text("source: list.jsonl\n")
    Path("other.json").write_text("{}")
    before = {one.name: one.read_bytes() for one in here.iterdir()}
    with pytest.raises(SystemExit):
        call("units", "--summary", file)
    said = capsys.readouterr().err
    assert "argument --summary: " in said and ("is there" in said) == (file == "other.json")
    assert {one.name: one.read_bytes() for one in here.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "verb", "message"),
    [
        (
            ["units", "--source", "list.jsonl"],
            "units",
            "unknown option --source; settings have no dashes: write source=",
        ),
        (["eval", "--compare"], "eval", "argument --compare: expected at least one argument"),
        (["run"], "run", "the following arguments are required"),
        (["lable", "teacher=t"], None, "unknown verb lable; did you mean label?"),
    ],
)
def test_words_that_are_refused(here: Path, words: list[str], verb: str | None, message: str) -> None:
    for option in (["--summary", "said.json"], ["--summary=said.json"]):
        with pytest.raises(SystemExit) as end:
            call(*words, *option)
        assert end.value.code == Status.MISTAKE
        value = said("said.json")
        assert (value["verb"], value["status"], value["exit"]) == (verb, "mistake", 2)
        assert message in value["message"]
        Path("said.json").unlink()


def test_it_is_json_though_a_number_is_none_and_the_version_not_known(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> str:
        raise importlib.metadata.PackageNotFoundError("asr-kd")

    def refuse(name: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    with summarised("units", "said.json"):
        tell_summary(figures={"loss": float("nan"), "rates": [float("inf"), 1.5]})
    value = json.loads(Path("said.json").read_text(), parse_constant=refuse)
    assert value["figures"] == {"loss": None, "rates": [None, 1.5]} and value["version"] == "unknown"
