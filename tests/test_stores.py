"""Every verb with its audio, targets and checkpoints in an object store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from asr_kd import cli
from asr_kd.objects import ObjectPath

S3 = Any
WORDS = ("ab", "ba", "a b", "b a")


def call(*words: str) -> None:
    assert cli.main(list(words)) == 0


def recordings(folder: Path) -> None:
    lines = []
    for number in range(8):
        sound = np.random.default_rng(number).normal(0, 0.1, 6400 + 400 * number)
        soundfile.write(folder / f"u{number}.wav", sound, 8000)
        lines.append(json.dumps({"audio": f"u{number}.wav", "text": WORDS[number % 4], "speaker": f"s{number % 2}"}))
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")


def without_times(content: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in content.items() if name not in ("timing.json", "summary.json")}


def test_the_whole_road(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recordings(tmp_path)
    audio, units, targets = f"{s3.url}/audio", f"{s3.url}/units", f"{s3.url}/targets"
    prepare = ["manifest=list.jsonl", "samples_per_shard=3"]
    call("prepare", *prepare, f"output={audio}")
    call("prepare", *prepare, "output=audio")
    made = {str(path.relative_to("audio")): path.read_bytes() for path in Path("audio").rglob("*") if path.is_file()}
    assert without_times(s3.content(audio)) == without_times(made)
    s3.requests.clear()
    call("prepare", *prepare, f"output={audio}")  # nothing to do
    assert not [path for method, path in s3.requests if path.endswith(".tar") and method != "HEAD"]

    call("units", f"source={audio}", f"output={units}", "kind=char", "size=20")
    settings: dict[str, Any] = {
        "units": units, "development": audio, "device": "cpu", "features": {"sample_rate": 8000, "mels": 8},
        "model": {"layers": 1, "size": 8}, "evaluate_every": 50, "tensorboard": False,
    }  # fmt: skip
    source: dict[str, Any] = {"audio": audio, "ctc": 1.0}
    teacher = {**settings, "output": "teacher", "phases": [{"sources": [source], "passes": 1}]}
    Path("teacher.yaml").write_text(yaml.safe_dump(teacher))
    call("train", "teacher.yaml")
    checkpoint = s3.upload("teacher/best", "teacher")
    call("label", f"teacher={checkpoint}", f"audio={audio}", f"output={targets}", "device=cpu")
    call(
        "verify",
        f"targets={targets}",
        f"audio={audio}",
        f"teacher={checkpoint}",
        "device=cpu",
        f"report={s3.url}/verified.json",
    )
    assert json.loads((ObjectPath.parse(s3.url) / "verified.json").read_bytes())["holds"]
    (ObjectPath.parse(targets) / "shard-000001.tar").unlink()
    assert cli.main(["verify", f"targets={targets}", f"audio={audio}", f"teacher={checkpoint}", "device=cpu"]) == 1
    assert "shard-000001.tar: this audio shard has no soft targets" in capsys.readouterr().out
    call("label", f"teacher={checkpoint}", f"audio={audio}", f"output={targets}", "device=cpu")
    call(
        "inspect", f"targets={targets}", "key=u4", f"units={units}", f"audio={audio}", f"png={s3.url}/u4.png", "rows=2"
    )
    call("inspect", f"targets={targets}/shard-000002.tar")
    call("plan", "hours=10", f"audio={audio}", f"targets={targets}")
    assert (ObjectPath.parse(s3.url) / "u4.png").read_bytes(4) == b"\x89PNG"

    chosen, pairs = f"{s3.url}/chosen.jsonl", f"{s3.url}/pairs.jsonl"
    call("select", f"audio={audio}", f"targets={targets}", "share=0.8", f"output={chosen}")
    call("pair", f"heard={audio}", "audio=audio", f"output={pairs}")
    sources = [
        {**source, "targets": targets, "soft": 1.0, "only": chosen},
        {"audio": "audio", "targets": targets, "soft": 1.0, "pairs": pairs},
    ]
    student = {
        **settings, "output": "student", "init": checkpoint, "loader_workers": 1,
        "phases": [{"sources": sources, "passes": 1}],
    }  # fmt: skip
    Path("student.yaml").write_text(yaml.safe_dump(student))
    call("train", "student.yaml")
    call(
        "eval",
        f"systems={{teacher: {checkpoint}, student: student}}",
        f"audio={audio}",
        f"output={s3.url}/report",
        "device=cpu",
    )
    assert b"WER" in (ObjectPath.parse(s3.url) / "report" / "report.html").read_bytes()
    call("transcribe", f"checkpoint={checkpoint}", f"audio={audio}", f"output={s3.url}/texts.jsonl", "device=cpu")
    assert len((ObjectPath.parse(s3.url) / "texts.jsonl").read_text().splitlines()) == 8
    (ObjectPath.parse(s3.url) / "u0.wav").write(Path("u0.wav").read_bytes())
    call("transcribe", f"checkpoint={checkpoint}", f"{s3.url}/u0.wav", "device=cpu")

    # a manifest in the store, and one that names audio there
    (ObjectPath.parse(s3.url) / "one.jsonl").write(b'{"audio": "u0.wav", "text": "ab"}\n')
    Path("other.jsonl").write_text(json.dumps({"audio": f"{s3.url}/u0.wav", "text": "ab"}) + "\n")
    call("prepare", f"manifest={s3.url}/one.jsonl", "output=one")
    call("prepare", "manifest=other.jsonl", "output=other")
    assert Path("one/shard-000000.tar").read_bytes() == Path("other/shard-000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "manifest=s3://{b}/none.jsonl", "output=x"], "none.jsonl: no such manifest; check the path"),
        (["units", "source=s3://{b}/none", "output=x"], "none: no such text file; check the path"),
        (["label", "teacher=t", "audio=s3://{b}/none", "output=x"], "none: no such folder of shards; check the path"),
        (["label", "teacher=t", "audio=s3://nobucket1/x", "output=x"], "s3://nobucket1/x/index.json: there is no such bucket"),
        (["inspect", "targets=s3://{b}/none.tar"], "none.tar: no such shard; check the path"),
        (["transcribe", "checkpoint=s3://{b}/none", "a.wav"], "none: holds no checkpoint.json"),
        (["train", "output=s3://{b}/run", "units=u", "development=d", "phases=[{sources: [{audio: a, ctc: 1}], passes: 1}]"],
         "output: s3://{b}/run: must be on a local disk; write there, and copy it"),
        (["eval", "systems={a: a}", "audio=s3://", "output=x"], "s3://: names no bucket; write s3://BUCKET/FOLDER"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    s3: S3, words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    bucket = s3.url.removeprefix("s3://")
    assert cli.main([word.replace("{b}", bucket) for word in words]) == 2
    error = capsys.readouterr().err
    assert said.replace("{b}", bucket) in error and error.count("\n") == 1
