"""End to end in small, on real speech: three words of one speaker, from recordings to the WER report."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from asr_kd import cli
from asr_kd.evaluation.wer import count_errors
from asr_kd.models.acoustic import load_checkpoint, parameters
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.tarset import read_index, read_shard, write_index, write_shard

ROOT = Path(__file__).parents[1]
WORDS = ("one", "six", "zero")
SYSTEMS = (
    "student-supervised",
    "teacher",
    "student-pseudo-label",
    "student-distilled",
    "student-lists",
    "student-oracle",
)
MINUTES = {"test": 0.8, "development": 0.3, "labelled": 0.8, "unlabelled": 1.2}
TAKES = {"test": range(5), "development": range(5, 10), "labelled": range(10, 20), "unlabelled": range(20, 50)}
STUDENT = {"kind": "lstm", "layers": 1, "size": 40, "dropout": 0.0, "delay_frames": 4}


def composer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("end_to_end_compose", ROOT / "pipelines" / "digits" / "compose.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["end_to_end_compose"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def write_recordings(folder: Path) -> None:
    """Audio files and a manifest for each split; the unlabelled one without its text, which goes to oracle.jsonl."""
    compose, source = composer(), ROOT / "data_manifests" / "digits"
    kept = [sample for shard in read_index(source) for sample in read_shard(source / shard.name)
            if sample.fields["text"] in WORDS and sample.fields["speaker"] == "jackson"]  # fmt: skip
    few = folder / "single"
    few.mkdir()
    write_index(few, [write_shard(few / "shard-000000.tar", kept)])
    recordings = compose.read_recordings(few)
    for number, (name, takes) in enumerate(TAKES.items()):
        own = [recording for recording in recordings if recording.take in takes]
        strings = list(compose.strings_of_digits(own, MINUTES[name], np.random.default_rng(number)))
        with open(folder / f"{name}.jsonl", "w") as manifest, open(folder / f"{name}-oracle.jsonl", "w") as oracle:
            for position, (waveform, text, speaker) in enumerate(strings):
                key = f"{name}-{position:03d}"
                (folder / f"{key}.wav").write_bytes(compose.to_wav(waveform))
                line = {"key": key, "audio": f"{key}.wav", "speaker": speaker}
                manifest.write(json.dumps(line if name == "unlabelled" else {**line, "text": text}) + "\n")
                oracle.write(json.dumps({"key": key, "text": text}) + "\n")


def call(verb: str, *words: str) -> None:
    assert cli.main([verb, *words]) == 0


def train(name: str, model: dict[str, Any], passes: int, rate: float, *sources: dict[str, Any], **more: Any) -> None:
    settings = {
        "output": name, "units": "units", "development": "shards/development", "features": {"sample_rate": 8000},
        "model": model, "batch_frames": 200, "evaluate_every": 1000, "device": "cpu", "tensorboard": False,
        "feature_cache": "features", "phases": [{"sources": list(sources), "passes": passes, "learning_rate": rate}],
        **more,
    }  # fmt: skip
    Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    call("train", f"{name}.yaml")


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which everything was run."""
    folder = tmp_path_factory.mktemp("road")
    write_recordings(folder)
    labelled: dict[str, Any] = {"audio": "shards/labelled", "ctc": 1.0, "augment": {"stretch": 0.1}}
    unlabelled: dict[str, Any] = {"audio": "shards/unlabelled"}
    adapted: dict[str, Any] = {"init": "student-supervised"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in TAKES:
            call("prepare", f"manifest={name}.jsonl", f"output=shards/{name}", "samples_per_shard=10")
        call("units", "source=shards/labelled", "output=units", "kind=bpe", "size=17")
        train("student-supervised", STUDENT, 50, 0.01, labelled)
        call(
            "label",
            "teacher=student-supervised",
            "audio=shards/labelled",
            "output=alignment",
            "mode=alignment",
            "hold_frames=4",
        )
        timed = {**labelled, "targets": "alignment", "ctc_within_targets": True}
        train("teacher", {"kind": "blstm", "layers": 1, "size": 64}, 50, 0.01, timed)
        call("label", "teacher=teacher", "audio=shards/unlabelled", "output=soft-targets")
        call("transcribe", "checkpoint=teacher", "audio=shards/unlabelled", "output=pseudo-labels.jsonl")
        soft = {**unlabelled, "targets": "soft-targets", "soft": 1.0, "spikes": {}}
        train("student-distilled", STUDENT, 8, 0.004, soft, labelled, **adapted)
        call("lm", "source=shards/labelled", "units=units", "output=text")
        search = ("decoder=beam", "nbest=4", "lexicon=text/words.txt", "lm=text/lm.arpa")
        call("transcribe", "checkpoint=teacher", "audio=shards/unlabelled", "output=lists.jsonl", *search)
        lists = {**unlabelled, "transcripts": "lists.jsonl", "soft": 1.0, "sequences": {"draws": 2}}
        train("student-lists", STUDENT, 8, 0.004, lists, labelled, **adapted)
        pseudo = {**unlabelled, "transcripts": "pseudo-labels.jsonl", "ctc": 1.0}
        train("student-pseudo-label", STUDENT, 8, 0.004, pseudo, labelled, **adapted)
        oracle = {**unlabelled, "transcripts": "unlabelled-oracle.jsonl", "ctc": 1.0}
        train("student-oracle", STUDENT, 8, 0.004, oracle, labelled, **adapted)
        call(
            "eval", *(f"systems.{name}={name}" for name in SYSTEMS), "audio=shards/test", "output=report",
            "baseline=student-supervised", "teacher=teacher", "student=student-distilled", "bootstrap=200",
        )  # fmt: skip
    return folder


def test_no_text_reaches_the_unlabelled_shards(road: Path) -> None:
    for info in read_index(road / "shards" / "unlabelled"):
        for sample in read_shard(road / "shards" / "unlabelled" / info.name):
            assert sample.fields.keys() == {"seconds", "speaker"}


def test_the_report_has_every_system(road: Path) -> None:
    report = json.loads((road / "report" / "report.json").read_text())
    assert set(report["systems"]) == set(SYSTEMS)
    reference = read_transcripts(road / "test-oracle.jsonl")
    words = sum(len(text.split()) for text in reference.values())
    for name, system in report["systems"].items():
        assert 0 <= system["wer"] < 0.9 and system["words"] == words, (name, system["wer"])
        assert system["parameters"] == parameters(load_checkpoint(road / name).model)
    assert report["systems"]["student-distilled"]["wer"] < 0.5 and report["systems"]["student-lists"]["wer"] < 0.5
    page = (road / "report" / "report.html").read_text()
    assert all(name in page for name in SYSTEMS) and "http://" not in page.replace("http://www.w3.org", "")


def test_the_student_hears_what_the_teacher_hears(road: Path) -> None:
    """Soft targets and pseudo-labels tell of the same audio, utterance by utterance."""
    targets = json.loads((road / "soft-targets" / "report.json").read_text())
    audio = read_index(road / "shards" / "unlabelled")
    assert targets["labelled"] == sum(shard.samples for shard in audio) and targets["quarantined"] == 0
    assert targets["bytes_per_frame"] < 80
    texts, truth = read_transcripts(road / "pseudo-labels.jsonl"), read_transcripts(road / "unlabelled-oracle.jsonl")
    assert list(texts) == list(truth)
    counts = [count_errors(truth[key], texts[key]) for key in truth]
    wrong = sum(count.substitutions + count.deletions + count.insertions for count in counts)
    assert wrong < 0.6 * sum(count.words for count in counts), "the teacher knows most words"


def test_lists_hold_words_of_the_labelled_text_alone(road: Path) -> None:
    assert (road / "text" / "words.txt").read_text().split() == sorted(WORDS)
    lines = [json.loads(line) for line in (road / "lists.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(read_transcripts(road / "unlabelled-oracle.jsonl"))
    for line in lines:
        assert line["nbest"][0]["text"] == line["text"]
        assert {word for one in line["nbest"] for word in one["text"].split()} <= set(WORDS)


def test_transcribe_reads_any_file(
    road: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(road)
    capsys.readouterr()
    call("transcribe", "checkpoint=teacher", "unlabelled-000.wav")
    greedy = capsys.readouterr().out.strip()
    assert greedy == read_transcripts(road / "pseudo-labels.jsonl")["unlabelled-000"].strip()
    call("transcribe", "checkpoint=student-distilled", "decoder=beam", "unlabelled-000.wav", "test-000.wav")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["unlabelled-000.wav", "test-000.wav"]


def test_the_same_commands_again_change_nothing(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(road)
    kept = [
        *road.glob("soft-targets/*.tar"),
        road / "units" / "units.model",
        road / "teacher" / "best" / "model.safetensors",
    ]
    before = [path.read_bytes() for path in kept]
    call("units", "source=shards/labelled", "output=units", "kind=bpe", "size=17")
    call("train", "teacher.yaml")
    call("label", "teacher=teacher", "audio=shards/unlabelled", "output=soft-targets")
    assert [path.read_bytes() for path in kept] == before
