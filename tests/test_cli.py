from __future__ import annotations

import errno
import getpass
import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asr_kd import cli
from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.verbs import VERBS
from asr_kd.ending import Stopped
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import read_index
from asr_kd.shards.texts import train_units

SHOWN = [verb.name for verb in VERBS.values() if verb.help]
#: a whole set of training settings, but that nothing of it is there
TRAIN = ["output=run", "units=none", "development=none", "phases=[{sources: [{audio: none, ctc: 1.0}], passes: 1}]"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a text, and a manifest of two recordings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three\nfour five\n" * 3)
    for name in ("a.wav", "b.wav"):
        soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 4000), 8000)
    lines = [{"key": name[0], "audio": name, "text": "one two"} for name in ("a.wav", "b.wav")]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def checkpoint(here: Path) -> str:
    torch.set_num_threads(1)
    units = train_units(UnitsSettings(source="text.txt", output="letters", kind="char", size=30))
    features, settings = FeatureSettings(sample_rate=8000, mels=8), ModelSettings(layers=1, size=8)
    model = build_model(settings, features.dimension, units.size)
    save_checkpoint(here / "checkpoint", model, units, features, settings)
    return "checkpoint"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command that must end with status 2 and one line that holds these words."""

    def check(command: list[str], *words: str) -> None:
        capsys.readouterr()
        try:
            status = cli.main(command)
        except SystemExit as end:
            status = int(end.code or 0)
        output, errors = capsys.readouterr()
        assert (status, errors.count("\n"), output) == (2, 1, ""), errors
        assert errors.startswith("asr-kd") and [word for word in words if word not in errors] == [], errors

    return check


Refused = Callable[..., None]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["lable"], ["unknown verb lable; did you mean label? see asr-kd --help"]),
        ([], ["VERB", "--help"]),
        (["run"], ["PIPELINE"]),
        (["train", "--fast"], ["--fast"]),
        (["units", "none.yaml"], ["none.yaml", "no such settings file"]),
        (["units", "."], [".: is a folder"]),
        (["units", "a.yaml", "b.yaml"], ["b.yaml", "one settings file"]),
        (["units", "source"], ["source", "no such settings file", "write source=source"]),
        (["prpare", "a=b"], ["unknown verb prpare; did you mean prepare? see asr-kd --help"]),
        (["xyzzy"], ["xyzzy", "prepare", "train"]),
        (["prepare", "manifest", "=", "ok.jsonl"], ["write manifest=ok.jsonl, without spaces around ="]),
        (["prepare", "manifest", "=ok.jsonl"], ["write manifest=ok.jsonl, without spaces around ="]),
        (["run", "digits", "run", "="], ["write run=VALUE, without spaces around ="]),
        (["prepare"], ["the keys manifest and output are missing; set them (see `asr-kd prepare --help`)"]),
        (["units", "text.txt"], ["text.txt: is no settings file", "write source=text.txt"]),
        (["prepare", "list.jsonl"], ["list.jsonl: is no settings file", "write manifest=list.jsonl"]),
        (["verify", "."], [".: is a folder", "write targets=."]),
        (["eval", "runs/v1.0"], ["write systems.NAME=runs/v1.0"]),
        (["prepare", "--manifest", "list.jsonl"], ["--manifest", "write manifest=list.jsonl", "asr-kd prepare --help"]),
        (["prepare", "output=o", "--max-seconds=3"], ["--max-seconds=3", "write max_seconds=3"]),
        (["label", "--audio"], ["write audio=VALUE"]),
        (["label", "--audio", "--output", "x"], ["write audio=VALUE"]),
        (["doctor", "here"], ["write folder=here"]),
        (["units", "--summary", "text.txt"], ["--summary", "text.txt", "ends in .json"]),
        (["units", "=text.txt"], ["=text.txt", "key=value"]),
        (["units", "size=["], ["size=[", "not valid YAML"]),
        (["units", "source=text.txt"], ["the key output is missing"]),
        (["units", "source=text.txt", "output=o", "sise=8"], ["unknown key sise", "did you mean size?"]),
        (["units", "source=text.txt", "output=o", "size=big"], ["size", "'big'"]),
        (["units", "source=text.txt", "output=o", "size=5000"], ["size: 5000"]),
        (["units", "source=none.txt", "output=o"], ["none.txt"]),
        (["units", "source=text.txt", "output=text.txt/o", "kind=char"], ["text.txt/o", "not a folder"]),
        (["prepare", "manifest=none.jsonl", "output=o"], ["none.jsonl", "no such manifest"]),
        (["train", *TRAIN], ["none", "units"]),
        (["train", *TRAIN, "phases.0.sources.0.agument={}"], ["phases.0.sources.0.agument", "did you mean augment?"]),
        (["train", *TRAIN, "device=gpu"], ["device", "gpu"]),
        (["label", "teacher=none", "audio=none", "output=o"], ["none", "folder of shards"]),
        (["eval", "systems={}", "audio=none", "output=o"], ["systems"]),
        (["eval", "systems.a=none", "audio=none", "output=o"], ["none"]),
        (["transcribe", "checkpoint=none", "a.wav"], ["none", "checkpoint"]),
        (["transcribe", "a.wav"], ["the key checkpoint is missing"]),
        (["transcribe", "checkpoint=none"], ["give audio files"]),
        (["transcribe", "checkpoint=c", "audio=s"], ["audio", "output"]),
        (["run", "none"], ["none", "a recipe that comes with asr-kd", "digits"]),
        (["run", "a", "b"], ["one pipeline"]),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(here: Path, refused: Refused, command: list[str], words: list[str]) -> None:
    before = set(here.rglob("*"))
    refused(command, *words)
    assert set(here.rglob("*")) == before, "nothing half-written"


def test_a_settings_file_may_have_an_equals_sign_in_its_name(here: Path, refused: Refused) -> None:
    (here / "rate=1.yaml").write_text("ouput: x\n")
    refused(["prepare", "rate=1.yaml"], "rate=1.yaml: unknown key ouput")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source: [text.txt\n", ["line 2", "not valid YAML"]),
        ("- source\n", ["key: value", "list"]),
        ("source: text.txt\noutput: o\nsise: 8\n", ["unknown key sise", "did you mean size?"]),
        ("source: text.txt\noutput: o\nkind: letters\n", ["kind", "'char'", "'letters'"]),
        ("source: text.txt\n", ["the key output is missing", "folder of the units"]),
    ],
)
def test_mistakes_in_a_settings_file_name_it(here: Path, refused: Refused, text: str, words: list[str]) -> None:
    (here / "units.yaml").write_text(text)
    refused(["units", "units.yaml"], "units.yaml: ", *words)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["holds no utterances"]),
        (['{"audio": "a.wav"}', "a.wav"], ["line 2", "not JSON"]),
        (['{"audio": "a.wav"}', "", "[1]"], ["line 3"]),
        (['{"sound": "a.wav"}'], ["line 1", "audio"]),
        (['{"audio": "a.wav", "key": "k"}', '{"audio": "b.wav", "key": "k"}'], ["line 2", "k"]),
    ],
)
def test_mistakes_in_a_manifest_name_the_line(here: Path, refused: Refused, lines: list[str], words: list[str]) -> None:
    (here / "bad.jsonl").write_text("".join(line + "\n" for line in lines))
    refused(["prepare", "manifest=bad.jsonl", "output=o"], "bad.jsonl", *words)
    assert not (here / "o").exists()


def test_settings_come_from_file_and_overrides(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "units.yaml").write_text("source: text.txt\noutput: o\nkind: bpe\n")
    assert cli.main(["units", "units.yaml", "kind=char", "size=30"]) == 0
    output, errors = capsys.readouterr()
    assert "char pieces" in output and "bpe" not in output and errors == ""
    assert (here / "o" / "units.model").exists()


def test_prepare_writes_shards(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "manifest=list.jsonl", "output=o", "samples_per_shard=1"]) == 0
    assert "2 utterances in = 2 written + 0 quarantined" in capsys.readouterr().out
    assert [shard.samples for shard in read_index(here / "o")] == [1, 1]


def test_output_of_other_settings_is_refused(here: Path, refused: Refused) -> None:
    assert cli.main(["units", "source=text.txt", "output=o", "kind=char", "size=30"]) == 0
    refused(["units", "source=text.txt", "output=o", "kind=bpe", "size=30"], "o: belongs to other settings", "kind")
    refused(["prepare", "manifest=list.jsonl", "output=o"], "o: holds the output of another job")
    (here / "mine").mkdir()
    (here / "mine" / "letter.txt").write_text("")
    refused(["prepare", "manifest=list.jsonl", "output=mine"], "mine: is not empty")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"format": "other"}, ["not a checkpoint of asr_kd"]), ({"version": 99}, ["version 99"])],
)
def test_checkpoint_of_another_format_is_refused(
    here: Path, refused: Refused, checkpoint: str, changes: dict[str, Any], words: list[str]
) -> None:
    path = here / checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert cli.main(["prepare", "manifest=list.jsonl", "output=shards"]) == 0
    refused(["transcribe", f"checkpoint={checkpoint}", "a.wav"], "checkpoint.json", *words)
    refused(["label", f"teacher={checkpoint}", "audio=shards", "output=o"], "checkpoint.json", *words)
    refused(["eval", f"systems.a={checkpoint}", "audio=shards", "output=o"], "checkpoint.json", *words)
    assert not (here / "o").exists()


def test_transcribe_prints_a_text_for_each_file(
    here: Path, checkpoint: str, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    (here / "take=2.wav").write_bytes((here / "b.wav").read_bytes())
    assert cli.main(["transcribe", f"checkpoint={checkpoint}", "a.wav", "b.wav", "take=2.wav"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a.wav", "b.wav", "take=2.wav"]
    for name, data in {
        "empty.wav": b"",
        "text.wav": b"not audio",
        "torn.wav": (here / "a.wav").read_bytes()[:50],
    }.items():
        (here / name).write_bytes(data)
        refused(["transcribe", f"checkpoint={checkpoint}", name], name)
    refused(["transcribe", f"checkpoint={checkpoint}", "none.wav"], "none.wav", "check the path")


def test_no_space_left_is_one_line_and_the_command_can_go_on(
    here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ["units", "source=text.txt", "output=o", "kind=char", "size=30"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(command, "o/job.json", "no space left")
    assert not list(here.glob("o/*"))
    assert cli.main(command) == 0


def test_any_other_trouble_with_files_is_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "shards/shard-000003.tar")

    monkeypatch.setattr(cli, "_do", broken)
    refused(["units"], "shards/shard-000003.tar: Input/output error")


def test_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_do", interrupted)
    assert cli.main(["label"]) == 130
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and "same command goes on" in errors


def test_sigterm_is_one_line_and_its_handler_goes_with_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_do", ended)
    assert cli.main(["prepare"]) == 143
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and "same command goes on" in errors
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_user_without_a_name_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, where torch could not train for a user of whom only the number is known."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    cli.main(["inspect", "nothing-there"])
    assert getpass.getuser() == str(os.getuid())


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_do", wrong)
    with pytest.raises(ZeroDivisionError):
        cli.main(["label"])
    monkeypatch.setattr(sys, "argv", ["asr-kd", "label"])
    with pytest.raises(SystemExit) as end:
        cli.command()
    assert end.value.code == 3, "1 is of a verify that does not hold"
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("status", [130, 143])
def test_a_job_that_stopped_as_asked_says_so_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    def stopped(*_: object) -> None:
        raise Stopped("run: stopped at step 3 as asked; the same command goes on from there", status)

    monkeypatch.setattr(cli, "_do", stopped)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err.startswith("asr-kd train: run: stopped at step 3")


@pytest.mark.parametrize("verb", SHOWN)
def test_help_of_a_verb_names_its_settings(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    output = capsys.readouterr().out
    fields = VERBS[verb].kind().model_fields if VERBS[verb].settings else ()
    assert end.value.code == 0 and all(f"{name}:" in output for name in fields)


QUICK = """
import sys
from asr_kd import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "torchaudio", "sentencepiece", "rapidfuzz", "soundfile"} & set(sys.modules)
print("loaded:", sorted(heavy))
"""


def test_help_lists_what_is_in_groups_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, depth in (
        ("phases", 2),
        ("sources", 6),
        ("sequences", 10),
        ("draws", 14),
        ("snr_min", 18),
        ("block_steps", 10),
    ):
        assert any(line.startswith(" " * depth + f"{name}: ") for line in lines), name


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["train", "sede=1"]])
def test_help_and_settings_mistakes_load_nothing_heavy(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", QUICK, *command], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded: []"
    if command == ["--help"]:
        assert all(verb in result.stdout for verb in SHOWN)


def test_as_a_program(here: Path) -> None:
    program = Path(sys.executable).parent / "asr-kd"
    result = subprocess.run([program, "units", "source=none.txt", "output=o"], capture_output=True, text=True, cwd=here)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "asr-kd units: none.txt: no such text file; check the path\n"
