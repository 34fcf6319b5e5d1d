from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from asr_kd import cli
from asr_kd.ending import Stopped
from asr_kd.errors import UserError
from asr_kd.files import write_json
from asr_kd.pipeline import load_pipeline, run_pipeline
from asr_kd.shards.leases import Leases

#: a recipe's script: joins its inputs, and says in a list that it ran
SCRIPT = """
import argparse, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--output")
parser.add_argument("--wait-for")
parser.add_argument("inputs", nargs="*")
values = parser.parse_args()
with open("ran.txt", "a") as ran:
    ran.write(values.output.rsplit("/", 1)[-1] + "\\n")
text = "".join(pathlib.Path(name).read_text() if pathlib.Path(name).exists() else name for name in values.inputs)
if "fail" in text:
    sys.exit("this text is no good")
deadline = time.monotonic() + 300
while values.wait_for and not pathlib.Path(values.wait_for).exists():
    if time.monotonic() > deadline:
        sys.exit("waited in vain")
    time.sleep(0.02)
pathlib.Path(values.output).write_text(text)
print("wrote", values.output)
"""

Write = Callable[..., None]


def script(output: str, *arguments: str) -> dict[str, Any]:
    return {"verb": "script", "settings": {"file": "join.py", "output": output, "arguments": list(arguments)}}


def units(source: str = "${run}/text.txt", **changes: Any) -> dict[str, Any]:
    return {
        "verb": "units",
        "settings": {"source": source, "output": "${run}/units", "kind": "char", "size": "${size}", **changes},
    }


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write pipeline.yaml into the working folder: by default three stages, two of which read from the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "join.py").write_text(SCRIPT)
    (tmp_path / "words.txt").write_text("one two three\n")

    def write(stages: dict[str, Any] | None = None, **variables: Any) -> None:
        stages = stages or {
            "text": script("${run}/text.txt", "words.txt", "${more}"),
            "units": units(),
            "copy": script("${run}/copy.txt", "${run}/text.txt"),
        }
        values = {"variables": {"run": "out", "more": "four\n", "size": 30, **variables}, "stages": stages}
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    write()
    return write


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run the pipeline; the stages that ran, in order."""

    def run(*assignments: str) -> list[str]:
        capsys.readouterr()
        run_pipeline(".", list(assignments))
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[1] for line in lines if line.startswith("done: ")]

    return run


Ran = Callable[..., list[str]]


def test_stages_run_in_order_once(write: Write, ran: Ran, tmp_path: Path) -> None:
    assert ran() == ["text", "units", "copy"]
    assert (tmp_path / "out" / "copy.txt").read_text() == "one two three\nfour\n"
    assert (tmp_path / "out" / "units" / "units.model").exists()
    assert "wrote out/text.txt" in (tmp_path / "out" / "logs" / "text.log").read_text()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert ran() == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_what_a_setting_changes_runs_again(write: Write, ran: Ran, tmp_path: Path) -> None:
    ran()
    assert ran("size=29") == ["units"]
    assert ran("size=29") == []
    write(more="five\n")
    assert ran("size=29") == ["text", "units", "copy"]
    assert (tmp_path / "out" / "copy.txt").read_text() == "one two three\nfive\n"
    assert ran("size=29", "run=elsewhere") == ["text", "units", "copy"]
    assert ran("size=29") == [], "another run does not touch this one"


def test_an_input_that_changes_runs_everything_behind_it_again(write: Write, ran: Ran, tmp_path: Path) -> None:
    ran()
    (tmp_path / "words.txt").write_text("six\n")
    assert ran() == ["text", "units", "copy"]
    assert (tmp_path / "out" / "copy.txt").read_text() == "six\nfour\n"
    os.utime(tmp_path / "words.txt", (1, 1))
    assert ran() == [], "content counts, not time"
    (tmp_path / "join.py").write_text(SCRIPT + "\n# another version\n")
    assert ran() == ["text", "units", "copy"], "the script is an input too"


def test_a_folder_is_an_input_of_prepare(write: Write, tmp_path: Path) -> None:
    for name in ("wav.scp", "text"):
        (tmp_path / "kaldi" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "kaldi" / name).write_text("u1 a.wav\n")
    write({"data": {"verb": "prepare", "settings": {"manifest": "kaldi", "output": "${run}/data"}}})

    def fingerprint() -> str:
        return load_pipeline(Path("pipeline.yaml"), [])[1][0].fingerprint

    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / "kaldi" / "text").write_text("u1 another\n")
    assert fingerprint() != before


def test_what_a_manifest_is_joined_with_is_an_input_of_prepare(write: Write, tmp_path: Path) -> None:
    (tmp_path / "supervisions.jsonl").write_text('{"id": "s", "recording_id": "r", "start": 0, "duration": 1}\n')
    (tmp_path / "recordings.jsonl").write_text("{}\n")
    write({"data": {"verb": "prepare", "settings": {"manifest": "supervisions.jsonl", "output": "${run}/data"}}})

    def fingerprint() -> str:
        return load_pipeline(Path("pipeline.yaml"), [])[1][0].fingerprint

    before = fingerprint()
    (tmp_path / "recordings.jsonl").write_text("{} \n")
    assert fingerprint() != before


def test_a_folder_of_tars_is_an_input_of_index(write: Write, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(b"a")
    write({"data": {"verb": "index", "settings": {"audio": "tars", "output": "${run}/data"}}})

    def fingerprint() -> str:
        return load_pipeline(Path("pipeline.yaml"), [])[1][0].fingerprint

    before = fingerprint()
    (tmp_path / "tars" / "index").mkdir()
    (tmp_path / "tars" / "index" / "index.json").write_text("{}")
    assert fingerprint() == before, "an index may lie in the folder"
    (tmp_path / "tars" / "b.tar").write_bytes(b"b")
    assert fingerprint() != before


def test_a_deleted_output_is_made_again(write: Write, ran: Ran, tmp_path: Path) -> None:
    ran()
    (tmp_path / "out" / "text.txt").unlink()
    assert ran() == ["text"], "what reads it need not run: it would be the same"
    assert ran() == []


def test_where_it_runs_and_on_how_many_threads_changes_nothing(write: Write) -> None:
    train = {
        "output": "${run}/net", "units": "${run}/units", "development": "dev", "threads": "${threads}",
        "phases": [{"sources": [{"audio": "${run}/text.txt", "ctc": 1.0}], "passes": 1}],
    }  # fmt: skip
    write({"text": script("${run}/text.txt"), "units": units(), "net": {"verb": "train", "settings": train}}, threads=1)
    marks = []
    for assignments in ([], ["run=other", "threads=2"], ["size=29"]):
        marks.append({stage.name: stage.fingerprint for stage in load_pipeline(Path("pipeline.yaml"), assignments)[1]})
    assert marks[0] == marks[1]
    assert marks[0]["text"] == marks[2]["text"] and marks[0]["net"] != marks[2]["net"]


def test_dry_run_prints_and_runs_nothing(
    write: Write, ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["run", ".", "--dry-run"],
        ["run", "--dry-run", ".", "size=29"],
        ["run", ".", "--dry-run", "size=29"],
    ):
        assert cli.main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:3] for line in lines] == [[name, "to", "do"] for name in ("text", "units", "copy")]
    assert "asr-kd units → out/units" in lines[1]
    assert not (tmp_path / "out").exists()
    ran()
    assert cli.main(["run", ".", "--dry-run", "size=29"]) == 0
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert states == ["unchanged", "to", "unchanged"]


def test_a_failing_stage_is_named_and_the_pipeline_goes_on_from_it(
    write: Write, ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(more="fail\n")
    assert cli.main(["run", "."]) == 2
    output, errors = capsys.readouterr()
    assert errors.count("\n") == 1
    assert "stage text failed (this text is no good); see out/logs/text.log" in errors
    assert "[text] this text is no good" in output and "units" not in (tmp_path / "ran.txt").read_text()
    assert "this text is no good" in (tmp_path / "out" / "logs" / "text.log").read_text()
    write()
    assert ran() == ["text", "units", "copy"]

    write({"text": script("${run}/text.txt", "words.txt"), "units": units(), "copy": script("${run}/copy.txt", "fail")})
    with pytest.raises(UserError, match="stage copy failed"):
        ran()
    write({"text": script("${run}/text.txt", "words.txt"), "units": units(), "copy": script("${run}/copy.txt", "good")})
    assert ran() == ["copy"]


def test_a_verb_that_refuses_ends_the_pipeline_with_its_sentence(write: Write, ran: Ran) -> None:
    with pytest.raises(UserError, match=r"stage units failed \(asr-kd units: size: 5000 bpe pieces cannot be made"):
        write({"text": script("${run}/text.txt", "words.txt"), "units": units(kind="bpe")})
        ran("size=5000")


def test_a_folder_that_no_stage_wrote_is_not_removed(write: Write, ran: Ran, tmp_path: Path) -> None:
    letter = tmp_path / "out" / "units" / "letter.txt"
    letter.parent.mkdir(parents=True)
    letter.write_text("dear")
    for assignments in ([], ["size=29"]):
        with pytest.raises(UserError, match="stage units: out/units is there, and this run did not write it"):
            ran(*assignments)
    assert letter.read_text() == "dear"
    letter.unlink()
    letter.parent.rmdir()
    assert "units" in ran()


def test_outside_the_run_nothing_is_removed(write: Write, ran: Ran, tmp_path: Path) -> None:
    write({"units": units("words.txt", output="mine")})
    assert ran() == ["units"]
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="mine: belongs to other settings"):
        ran("size=29")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    assert ran() == ["units"], "with the settings of old it is whole"


def test_stages_that_do_not_need_each_other_run_at_once(write: Write, ran: Ran) -> None:
    # the first ends only when the second has written
    stages = {
        "waits": script("${run}/waits.txt", "--wait-for", "${run}/first.txt"),
        "first": script("${run}/first.txt", "a"),
        "last": script("${run}/last.txt", "${run}/waits.txt"),
    }
    write(stages, jobs=2)
    *both, last = ran()  # the first may take longer to end than to write
    assert sorted(both) == ["first", "waits"] and last == "last"


def test_one_that_fails_stops_the_others(write: Write, ran: Ran, tmp_path: Path) -> None:
    write({"waits": script("${run}/waits.txt", "--wait-for", "never"), "bad": script("${run}/bad.txt", "fail")}, jobs=2)
    with pytest.raises(UserError, match="stage bad failed"):
        ran()
    log = tmp_path / "out" / "logs" / "waits.log"
    assert not log.exists() or "waited in vain" not in log.read_text(), "the other was ended"


def test_variables_are_overridden_with_their_types(write: Write) -> None:
    variables, stages = load_pipeline(Path("pipeline.yaml"), ["size=25", "run=other", "more=a=b"])
    assert (variables["run"], variables["more"]) == ("other", "a=b")
    assert stages[1].settings["size"] == 25 and str(stages[1].output) == "other/units"
    assert stages[0].settings["arguments"] == ["words.txt", "a=b"]
    assert [stage.needs for stage in stages] == [[], ["text"], ["text"]]


def test_a_variable_may_name_what_lies_in_the_run(write: Write) -> None:
    def needs(*words: str) -> tuple[list[str], str]:
        last = load_pipeline(Path("pipeline.yaml"), list(words))[1][-1]
        return last.needs, last.settings["source"]

    words = {"verb": "units", "settings": {"source": "${source}", "output": "${run}/words", "kind": "char"}}
    write({"text": script("${run}/text.txt"), "words": words}, source="${run}/text.txt")
    assert needs("run=other") == (["text"], "other/text.txt")
    assert needs("source=mine.txt") == ([], "mine.txt")
    assert needs("run=a", "source=${run}/text.txt") == (["text"], "a/text.txt")


def test_a_variable_is_text_or_a_number_as_the_setting_is_that_it_lands_in(write: Write) -> None:
    words = {"verb": "units", "settings": {"source": "${a}", "output": "${run}/${b}", "kind": "char", "size": "${e}"}}
    write({"words": words, "tell": script("${run}/x", "${b}", "${c}", "${d}-${b}")}, a="a", b=30, c="c", d="d", e=30)
    variables, stages = load_pipeline(
        Path("pipeline.yaml"), ["run=runs/exp #2", "a=2024-11-28", "b=0012", "c=null", "d=on", "e=1_0"]
    )
    expected = {"source": "2024-11-28", "output": "runs/exp #2/0012", "kind": "char", "size": 10}
    assert stages[0].settings.items() >= expected.items()
    assert stages[1].settings["arguments"] == ["0012", "null", "on-0012"]
    assert variables["run"] == "runs/exp #2"
    Path("pipeline.yaml").write_text(
        "variables: {run: 0012, a: on}\nstages: {tell: {verb: script, settings: {file: f, output: '${run}/${a}'}}}\n"
    )
    assert load_pipeline(Path("pipeline.yaml"), [])[1][0].output == Path("0012/on")


def test_another_run_with_a_hash_in_its_name_leaves_the_first_alone(write: Write, ran: Ran, tmp_path: Path) -> None:
    ran()
    before = (tmp_path / "out" / "units" / "units.model").read_bytes()
    assert ran("run=out #2", "size=12") == ["text", "units", "copy"]
    assert (tmp_path / "out" / "units" / "units.model").read_bytes() == before
    assert (tmp_path / "out #2" / "units" / "units.model").exists()


@pytest.mark.parametrize("run", ["s3://b/run", "S3://b", "s3:/b"])
def test_a_run_in_a_store_is_refused(write: Write, ran: Ran, run: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"local disk|not quite a URL"):
        ran(f"run={run}")
    assert not (tmp_path / "s3:").exists() and not (tmp_path / "S3:").exists()


@pytest.mark.parametrize(
    ("stages", "assignments", "message"),
    [
        ({"a": {"verb": "unit", "settings": {}}}, [], r"stages\.a\.verb: input should be 'script'.*given: 'unit'"),
        ({"a": {**units(), "need": "b"}}, [], r"unknown key stages\.a\.need; known keys: settings, verb"),
        ({"a": units(sise=3)}, [], r"stages\.a: unknown key sise; did you mean size"),
        ({"a": units(size="many")}, [], r"stages\.a: size: input should be a valid integer \(given: 'many'\)"),
        ({"a": units("${rum}/text.txt")}, [], r"stages\.a: \$\{rum\} is not a variable.*run, more, size"),
        ({"a": {"verb": "transcribe", "settings": {"checkpoint": "c"}}}, [], r"stages\.a: the key output is missing"),
        ({}, [], "stages: dictionary should have at least 1 item"),
        ({"a": units()}, ["sise=3"], r"sise=3: .*has no variable sise; it has run, more, size"),
        ({"a": units()}, ["size=["], r"size=\[: not valid YAML"),
        ({"a": units()}, ["size=x"], r"stages\.a: size"),
        ({"a": units()}, ["run="], r"variables\.run is missing"),
        ({"a": units()}, ["jobs=0"], "has no variable jobs"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    write: Write, tmp_path: Path, stages: dict[str, Any], assignments: list[str], message: str
) -> None:
    write({"text": script("${run}/text.txt"), **stages} if stages else None)
    if not stages:
        (tmp_path / "pipeline.yaml").write_text("variables: {run: out}\nstages: {}\n")
    with pytest.raises(UserError, match=message) as caught:
        run_pipeline(".", assignments)
    assert "pipeline.yaml" in str(caught.value) or assignments
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran.txt").exists()


def test_the_last_lines_say_what_came_of_it(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On folders as the jobs leave them: the stages themselves are current."""
    net = {
        "verb": "train",
        "settings": {
            "output": "${run}/net", "units": "units", "development": "dev", "init": "${run}/first",
            "phases": [{"sources": [{"audio": "audio", "ctc": 1.0}], "passes": 1}],
        },
    }  # fmt: skip
    report = {
        "verb": "eval",
        "settings": {"systems": {"net": "${run}/net"}, "audio": "test", "output": "${run}/report"},
    }
    better = {**net, "settings": {**net["settings"], "output": "${run}/better"}}
    write({"report": report, "copy": script("${run}/copy.txt", "good"), "net": net, "better": better})
    out = tmp_path / "out"
    start = {"folder": "out/first", "wer": 0.392, "loss": 0.3245, "won": False}
    for name, won in (("net", False), ("better", True)):
        training = {"step": 9, "started_from": {**start, "won": won}}
        write_json(out / name / "best" / "checkpoint.json", {"training": training})
    write_json(out / "report" / "report.json", {"verdict": "net has a WER of 40.80 %."})
    for stage in load_pipeline(tmp_path / "pipeline.yaml", [])[1]:
        if stage.verb != "script":
            write_json(stage.output / "job.json", {"job": stage.verb, "settings": {}})
            write_json(out / "stages" / f"{stage.name}.json", {"fingerprint": stage.fingerprint, "seconds": 1.0})
    said = [
        "net won nothing: no checkpoint was better than out/first, where it started (development WER 39.2 %, loss 0.325)",
        "report: net has a WER of 40.80 %.",
    ]
    run_pipeline(".", [], dry_run=True)
    assert not any(line in capsys.readouterr().out for line in said)
    for lines_before in ("1 stages in ", "better "):  # after the one stage that is due, and where none is
        run_pipeline(".", [])
        *before, lost, verdict = capsys.readouterr().out.splitlines()
        assert [lost, verdict] == said and before[-1].startswith(lines_before)


@pytest.mark.parametrize("jobs", [0, -1, "two", 1.5, True])
def test_a_number_of_jobs_that_is_none_is_refused(write: Write, jobs: Any) -> None:
    write(jobs=jobs)
    with pytest.raises(UserError, match=r"variables\.jobs"):
        run_pipeline(".", [])


def test_missing_inputs_are_named(write: Write, ran: Ran, tmp_path: Path) -> None:
    write({"units": units("none.txt")})
    with pytest.raises(UserError, match=r"^stage units: source: none\.txt is not there; correct it in the pipeline"):
        ran()
    assert not (tmp_path / "out").exists()
    (tmp_path / "none.txt").write_text("one two\n")
    assert ran() == ["units"]
    write({"copy": {"verb": "script", "settings": {"file": "none.py", "output": "${run}/copy.txt"}}})
    with pytest.raises(UserError, match=r"none\.py"):
        ran()
    with pytest.raises(UserError, match=r"nowhere: neither a file or folder here nor a recipe"):
        run_pipeline("nowhere", [])


def test_inputs_that_are_missing_are_named_before_anything_runs(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {"teacher": "${teacher}", "audio": "${run}/data", "output": "${run}/targets"}
    stages = {
        "text": script("${run}/text.txt", "words.txt", "folder-that-the-script-makes"),
        "units": units(),
        "data": {"verb": "prepare", "settings": {"manifest": "${list}", "output": "${run}/data"}},
        "targets": {"verb": "label", "settings": teacher},
        "net": {
            "verb": "train",
            "settings": {
                "output": "${run}/net", "units": "${run}/units", "development": "${run}/data", "feature_cache": "cache",
                "phases": [{"sources": [{"audio": ["${run}/data", "more-audio"], "teacher": "average", "soft": 1.0}], "passes": 1}],
                "ema_decay": 0.9,
            },
        },
    }  # fmt: skip
    write(stages, list="list.jsonl", teacher="hf:owner/name")
    said = [
        "stage data: manifest: list.jsonl is not there; give list=FILE",
        "stage net: phases.0.sources.0.audio.1: more-audio is not there; correct it in the pipeline, or put it there",
    ]
    assert cli.main(["run", ".", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[5:] == said
    assert cli.main(["run", "."]) == 2
    assert capsys.readouterr().err == f"asr-kd run: {said[0]}; 1 more are not there, see --dry-run\n"
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran.txt").exists()
    (tmp_path / "more-audio").mkdir()
    run_pipeline(".", ["list=s3://store/list.jsonl"], dry_run=True)
    assert len(capsys.readouterr().out.splitlines()) == 5, "what lies in a store is not looked for"


def test_a_second_run_in_the_same_folder_ends_and_leaves_the_first_alone(
    write: Write, ran: Ran, tmp_path: Path
) -> None:
    write({"waits": script("${run}/waits.txt", "--wait-for", "go")})
    process = subprocess.Popen([sys.executable, "-m", "asr_kd.cli", "run", "."], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (tmp_path / "ran.txt").exists():
        time.sleep(0.02)
    with pytest.raises(UserError, match=rf"^out: is being written by process {process.pid} on "):
        ran("more=other")
    (tmp_path / "go").write_text("")
    assert process.wait(300) == 0
    assert (tmp_path / "out" / "waits.txt").exists()
    assert not (tmp_path / "out" / ".writer").exists()


@pytest.mark.parametrize("leases", [".writer", ".leases"])
def test_the_output_of_a_stage_whose_job_lives_is_not_removed(
    write: Write, ran: Ran, tmp_path: Path, leases: str
) -> None:
    ran()
    before = (tmp_path / "out" / "units" / "units.model").read_bytes()
    with Leases(tmp_path / "out" / "units" / leases) as job:
        job.take("writer")
        with pytest.raises(UserError, match=rf"^stage units: out/units: is being written by process {os.getpid()} on"):
            ran("size=12")
    assert (tmp_path / "out" / "units" / "units.model").read_bytes() == before
    assert ran() == [], "it is still the first run's"
    assert ran("size=12") == ["units"]


@pytest.mark.parametrize("change", ["removed", "of another job"])
def test_a_stage_counts_only_while_its_own_claim_is_there(write: Write, ran: Ran, tmp_path: Path, change: str) -> None:
    ran()
    claim = tmp_path / "out" / "units" / "job.json"
    text = claim.read_text()
    claim.unlink()
    if change == "of another job":
        claim.write_text(text.replace('"size": 30', '"size": 31'))
    run_pipeline(".", [], dry_run=True)
    with pytest.raises(UserError, match=r"out/units: (is not empty|belongs to other settings)"):
        ran()
    claim.write_text(text)
    assert ran() == ["units"]


def test_a_record_of_an_older_version_counts(write: Write, ran: Ran, tmp_path: Path) -> None:
    ran()
    record = tmp_path / "out" / "stages" / "units.json"
    value = json.loads(record.read_text())
    del value["claim"]
    record.write_text(json.dumps(value))
    assert ran() == []


@pytest.mark.parametrize("status", [130, 143])
def test_a_stage_that_was_stopped_stops_the_run_with_its_status(
    write: Write, ran: Ran, tmp_path: Path, status: int
) -> None:
    (tmp_path / "end.py").write_text(f"import sys; sys.exit({status})")
    write({"ends": {"verb": "script", "settings": {"file": "end.py", "output": "${run}/ends.txt"}}})
    with pytest.raises(Stopped, match="stage ends was stopped; the same command goes on from there") as caught:
        ran()
    assert caught.value.status == status


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_ends_its_stages_and_goes_on(
    number: int, status: int, write: Write, ran: Ran, tmp_path: Path
) -> None:
    write({"text": script("${run}/text.txt", "words.txt"), "waits": script("${run}/waits.txt", "--wait-for", "go")})
    program = [sys.executable, "-m", "asr_kd.cli", "run", "."]
    # a shell's background jobs inherit an ignored SIGINT, and with it all that they start
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    deadline, begun = time.monotonic() + 300, tmp_path / "ran.txt"
    while time.monotonic() < deadline and not (begun.exists() and "waits.txt" in begun.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status and errors.count("\n") == 1
    (tmp_path / "go").write_text("")
    assert ran() == ["waits"]
