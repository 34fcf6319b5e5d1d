"""The recipes for a teacher from outside, in small: random teachers, a few embedded digits, from recordings to the report."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import random
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from asr_kd import cli
from asr_kd.evaluation.wer import align
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.tarset import read_index, read_shard

pytest.importorskip("transformers", reason="the extra hf is not installed")

from tests import stages
from tests.outside import only_letters, save_whisper, write_wave

ROOT = Path(__file__).parents[2]
SETS = {"labelled": 12, "unlabelled": 8, "development": 4, "test": 6}
SMALL = (
    "sample_rate=8000", "labelled_passes=2", "labelled_hours=0.001", "all_passes=2", "all_hours=0.001", "jobs=1", "device=cpu", "precision=float32",
    "model={kind: lstm, layers: 1, size: 16}",
)  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrained_table", ROOT / "pipelines" / "pretrained" / "table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests, and the unlabelled recordings as a folder of audio alone."""
    folder, source = tmp_path_factory.mktemp("recordings"), ROOT / "data_manifests" / "digits"
    info = read_index(source)[0]
    samples = list(read_shard(source / info.name))
    random.Random(0).shuffle(samples)  # they are in the order of their words
    taken = iter(samples)
    for name, count in SETS.items():
        (folder / name).mkdir()
        lines = []
        for sample in itertools.islice(taken, count):
            audio = f"{name}/{sample.key}.{sample.extension}"
            sound, rate = soundfile.read(io.BytesIO(sample.audio))
            # a random teacher's texts are as long as they like, and must fit
            soundfile.write(folder / audio, np.tile(sound, 4 if name == "unlabelled" else 1), rate)
            lines.append(json.dumps({"audio": audio, "key": sample.key, "text": sample.fields["text"]}) + "\n")
        assert len(lines) == count
        if name != "unlabelled":
            (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def run(recipe: str, recordings: Path, run: Path, *more: str) -> None:
    sets = (f"{name}={recordings / name}{'' if name == 'unlabelled' else '.jsonl'}" for name in SETS)
    assert cli.main(["run", f"pipelines/pretrained{recipe}", f"run={run}", *sets, *SMALL, *more]) == 0


def test_posteriors_of_a_teacher_to_the_report(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    stages.here(monkeypatch)
    (tmp_path / "teacher").mkdir()
    write_wave(tmp_path / "teacher")
    teacher = f"teacher={tmp_path / 'teacher'}"
    run("", recordings, tmp_path / "run", teacher, "segment={detector: energy, min_speech: 0.05}")
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert set(report["systems"]) == {"teacher", "student-supervised", "student"}
    assert all(one["words"] == SETS["test"] for one in report["systems"].values())
    [cut] = read_index(tmp_path / "run" / "data" / "unlabelled")
    keys = [sample.key for sample in read_shard(tmp_path / "run" / "data" / "unlabelled" / cut.name)]
    assert keys and all(re.search(r"-\d{7}-\d{7}$", key) for key in keys)  # `segment` reached prepare
    capfd.readouterr()
    run("", recordings, tmp_path / "run", teacher, "segment={detector: energy, min_speech: 0.05}")
    assert "to do" not in capfd.readouterr().out


def test_texts_of_a_teacher_to_the_table(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages.here(monkeypatch)
    save_whisper(tmp_path / "teacher")
    only_letters(tmp_path / "teacher", "eno")
    run("/text.yaml", recordings, tmp_path / "run", f"teacher={tmp_path / 'teacher'}", "beam=1", "min_avg_logprob=null")
    learned = read_transcripts(tmp_path / "run" / "pseudo-labels.jsonl")
    assert learned and set("".join(learned.values())) <= set("eno")
    found = json.loads((tmp_path / "run" / "table" / "table.json").read_text())
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert list(found) == ["teacher", "student-supervised", "student"]
    for name, one in report["systems"].items():
        assert found[name]["wer"] == pytest.approx(one["wer"]) and found[name]["words"] == one["words"]


@pytest.mark.parametrize(
    ("said", "heard", "count"),
    [
        ("n s v h t", "nsv ht", 5),
        ("n s v h t", "n s v h t", 0),
        ("go to n s now", "go to ns now", 2),
        ("go to n s now", "go to nf now", 0),
        ("a b", "", 0),
        ("", "a", 0),
        ("every one came", "everyone came", 2),
    ],
)
def test_errors_of_boundaries_are_those_that_go_with_the_spaces(
    script: ModuleType, said: str, heard: str, count: int
) -> None:
    assert script.of_boundaries(align(said, heard)) == count


def test_silence_of_the_teacher_is_deletions(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"settings": {"normalizer": "basic"}}))
    lines = [
        {"system": "student", "key": key, "reference_scored": text, "hypothesis_scored": "one"}
        for key, text in (("a", "one two"), ("b", "six"))
    ]
    (tmp_path / "utterances.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "teacher.jsonl").write_text('{"key": "a", "text": "One, two."}\n')
    found = {
        name: script.figures(pairs) for name, pairs in script.systems_of(tmp_path, tmp_path / "teacher.jsonl").items()
    }
    assert (found["teacher"]["deletions"], found["teacher"]["wer"]) == (1, pytest.approx(1 / 3))
    assert (found["student"]["deletions"], found["student"]["substitutions"]) == (1, 1)
    (tmp_path / "teacher.jsonl").write_text('{"key": "c", "text": "one"}\n')
    with pytest.raises(Exception, match=r"has no text of any utterance of .*; transcribe the set of the report"):
        script.systems_of(tmp_path, tmp_path / "teacher.jsonl")
