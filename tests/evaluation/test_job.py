from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from asr_kd import cli
from asr_kd.decoding.estimate import write_arpa
from asr_kd.errors import UserError
from asr_kd.evaluation import sharing
from asr_kd.evaluation.job import evaluate
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.wer import ErrorCounts, count_errors
from asr_kd.files import sha256_file
from asr_kd.shards.tarset import Sample, read_index, write_index, write_shard

Job = Callable[..., EvalSettings]


def good(index: int) -> Sample:
    data = io.BytesIO()
    soundfile.write(data, np.random.default_rng(index).normal(0, 0.1, 6000), 8000, format="WAV")
    return Sample(f"g{index}", data.getvalue(), "wav", {"text": "one two", "seconds": 0.75})


def shards_of(folder: Path, samples: list[Sample]) -> str:
    folder.mkdir()
    write_index(folder, [write_shard(folder / "shard-000000.tar", samples)])
    return str(folder)


@pytest.fixture
def job(checkpoints: dict[str, Path], audio: Path, tmp_path: Path) -> Job:
    def make(**changes: Any) -> EvalSettings:
        values = {
            "systems": {name: str(folder) for name, folder in checkpoints.items()}, "audio": str(audio),
            "output": str(tmp_path / "report"), "bootstrap": 50, "batch_frames": 60, "device": "cpu",
        }  # fmt: skip
        return EvalSettings.model_validate(values | changes)

    return make


def read(settings: EvalSettings) -> dict[str, Any]:
    return json.loads((Path(settings.output) / "report.json").read_text())


def test_end_to_end(job: Job, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    settings = job(baseline="student", teacher="teacher")
    evaluate(settings)
    report, folder = read(settings), Path(settings.output)
    lines = [json.loads(line) for line in (folder / "utterances.jsonl").read_text().splitlines()]
    assert [(line["system"], line["key"]) for line in lines] == [
        ("teacher", "u0"), ("teacher", "u1"), ("student", "u0"), ("student", "u1"), ("teacher", "u2"), ("student", "u2"),
    ]  # fmt: skip
    assert lines[0]["reference"] == "One, two."
    assert lines[0]["reference_scored"] == "one two"
    assert (report["version"], report["normalizer"], list(report["systems"])) == (3, "basic-2", ["teacher", "student"])
    assert report["data"] | {"audio": "", "hash": ""} == {
        "audio": "", "hash": "", "shards": 2, "utterances": 3, "quarantined": 0, "words": 6, "seconds": 2.1, "speakers": 2,
    }  # fmt: skip
    for name, system in report["systems"].items():
        mine = [line for line in lines if line["system"] == name]
        counts = [count_errors(line["reference_scored"], line["hypothesis_scored"]) for line in mine]
        total = sum(counts, ErrorCounts())
        assert system["wer"] == total.errors / 6
        for kind in ("words", "substitutions", "deletions", "insertions"):
            assert system[kind] == getattr(total, kind)
        assert sum(one["errors"] for one in system["speakers"].values()) == total.errors
        assert system["interval"][0] <= system["wer"] <= system["interval"][1]
        assert system["sentence_errors"] == sum(one.errors > 0 for one in counts)
        assert system["parameters"] * 4 == system["size_bytes"]
        assert system["real_time_factor"] > 0
    teacher, student = report["systems"]["teacher"], report["systems"]["student"]
    assert (teacher["lookahead_ms"], student["lookahead_ms"]) == (None, 75)
    assert teacher["real_time_factor_to_teacher"] == 1
    assert teacher["agreement_with_teacher"] == 1
    assert [point["development_wer"] for point in student["curve"]] == [0.9, 0.4]
    out = capsys.readouterr().out
    assert "| teacher" in out
    assert report["verdict"] in out
    assert report["verdict"] in (folder / "report.md").read_text()


def test_a_list_of_sets_is_scored_as_one(job: Job, audio: Path, tmp_path: Path) -> None:
    more = shards_of(tmp_path / "more", [good(3), good(4)])
    settings = job(audio=[str(audio), more])
    evaluate(settings)
    report = read(settings)
    assert list(report["sets"]) == ["test-more"]
    assert (report["data"]["utterances"], report["data"]["audio"]) == (5, f"{audio} + {more}")
    assert report["settings"]["audio"] == [str(audio), more]
    assert (tmp_path / "report" / "report.html").read_text().count("cannot be played") == 0


def test_the_same_command_again_gives_the_same_scores(job: Job) -> None:
    def scores(settings: EvalSettings) -> Any:
        evaluate(settings)
        kept = ("wer", "interval", "relative_change_to_teacher_interval", "worst", "confusions", "fingerprint")
        return {name: [system[key] for key in kept] for name, system in read(settings)["systems"].items()}

    settings = job(teacher="teacher")
    assert scores(settings) == scores(settings)


def test_beam_and_no_bootstrap(job: Job) -> None:
    settings = job(decoder="beam", beam=3, bootstrap=0, normalizer="none", systems={"only": job().systems["student"]})
    evaluate(settings)
    report = read(settings)
    assert report["normalizer"] == "none-3"
    assert report["systems"]["only"]["interval"] is None


def test_texts_and_language_models_that_do_not_fit_leave_the_folder_free(job: Job, tmp_path: Path) -> None:
    write_arpa(tmp_path / "upper.arpa", ["ONE TWO"], 2)
    with pytest.raises(UserError, match=r"upper.arpa: none of its 2 words can be spelt by the units"):
        evaluate(job(decoder="beam", lm=str(tmp_path / "upper.arpa")))
    other = dataclasses.replace(good(0), fields={"text": "ЕДНО", "seconds": 0.75})
    with pytest.raises(UserError, match=r"other: 1 of the 1 texts of .* that teacher cannot write: 'д', 'е'"):
        evaluate(job(audio=shards_of(tmp_path / "other", [other])))
    assert not Path(job().output).exists()


def test_bad_audio_is_left_out_for_all_and_counted(job: Job, tmp_path: Path) -> None:
    samples = [good(0), Sample("broken", b"no audio", "wav", {"text": "six"}), good(1)]
    settings = job(audio=shards_of(tmp_path / "mixed", samples), max_bad_share=0.5)
    evaluate(settings)
    report = read(settings)
    assert (report["data"]["utterances"], report["data"]["quarantined"]) == (2, 1)
    assert {system["utterances"] for system in report["systems"].values()} == {2}
    (line,) = (Path(settings.output) / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "broken"


def test_too_much_bad_audio_fails_and_publishes_nothing(job: Job, tmp_path: Path) -> None:
    settings = job(audio=shards_of(tmp_path / "mixed", [good(0), Sample("broken", b"", "wav", {"text": "six"})]))
    with pytest.raises(UserError, match=r"1 of 2 utterances cannot be used, .*broken.*max_bad_share"):
        evaluate(settings)
    assert {path.name for path in Path(settings.output).iterdir()} == {"job.json", "parts"}


def test_nothing_but_bad_audio(job: Job, tmp_path: Path) -> None:
    settings = job(
        audio=shards_of(tmp_path / "bad", [Sample("broken", b"", "wav", {"text": "six"})]), max_bad_share=1.0
    )
    with pytest.raises(UserError, match=r"bad: none of 1 utterances can be used .first: broken: empty"):
        evaluate(settings)


def test_a_set_of_nothing_but_bad_audio_is_refused_beside_a_good_one(job: Job, tmp_path: Path) -> None:
    bad = shards_of(tmp_path / "bad", [Sample("broken", b"", "wav", {"text": "six"})])
    settings = job(audio={"good": shards_of(tmp_path / "good", [good(0), good(1)]), "bad": bad}, max_bad_share=1.0)
    with pytest.raises(UserError, match=r"bad: none of 1 utterances can be used .first: broken: empty"):
        evaluate(settings)


def test_lines_are_json_whatever_the_fields(job: Job, tmp_path: Path) -> None:
    sample = good(0)
    sample.fields |= {"snr": 12345678, "room": 3, "tags": ["a"]}
    folder = tmp_path / "odd"
    shards_of(folder, [sample])
    path = folder / "shard-000000.tar"  # as another program writes it
    path.write_bytes(path.read_bytes().replace(b"12345678", b"     NaN"))
    write_index(folder, [dataclasses.replace(next(iter(read_index(folder))), sha256=sha256_file(path))])
    settings = job(audio=str(folder))
    evaluate(settings)
    for line in (Path(settings.output) / "utterances.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["fields"] == {"room": 3}


def test_shards_without_text(job: Job, tmp_path: Path) -> None:
    sample = good(0)
    del sample.fields["text"]
    with pytest.raises(UserError, match=r"shard-000000.tar: g0 has no text"):
        evaluate(job(audio=shards_of(tmp_path / "unlabelled", [sample])))


def test_texts_without_words(job: Job, tmp_path: Path) -> None:
    sample = good(0)
    sample.fields["text"] = "..."
    with pytest.raises(UserError, match="the texts hold no words"):
        evaluate(job(audio=shards_of(tmp_path / "wordless", [sample])))


def test_an_empty_set(job: Job, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_index(tmp_path / "empty", [])
    with pytest.raises(UserError, match="holds no utterances"):
        evaluate(job(audio=str(tmp_path / "empty")))


def test_a_shard_that_was_changed(job: Job, tmp_path: Path) -> None:
    folder = Path(shards_of(tmp_path / "changed", [good(0)]))
    write_shard(folder / "shard-000000.tar", [good(1)])
    with pytest.raises(UserError, match=r"shard-000000.tar"):
        evaluate(job(audio=str(folder)))


@pytest.mark.parametrize("role", ["baseline", "teacher", "student"])
def test_an_unknown_role_names_the_systems(job: Job, role: str) -> None:
    with pytest.raises(UserError, match=f"{role}: nobody is not a system; it must be one of teacher, student"):
        evaluate(job(**{role: "nobody"}))


def test_a_folder_of_other_settings(job: Job) -> None:
    evaluate(job(max_seconds=5.0))
    with pytest.raises(UserError, match=r"max_seconds was 5\.0, now 6\.0"):
        evaluate(job(max_seconds=6.0))


def test_what_is_made_of_the_scores_may_change(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(job(bootstrap=5))
    monkeypatch.setattr(sharing, "write_part", None)
    evaluate(job(bootstrap=6, baseline="teacher", max_bad_share=0.5))
    assert read(job())["bootstrap"]["resamples"] == 6


def test_a_condition(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = job()
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings.model_dump(), sort_keys=False))
    words = ["eval", str(tmp_path / "eval.yaml"), "--fail-if"]
    assert cli.main([*words, "studnt.wer > 0"]) == 2
    assert "studnt.wer names none of the systems (teacher, student)" in capsys.readouterr().err
    assert not Path(settings.output).exists()  # told before anything is scored
    assert cli.main([*words, "student.wer < 0"]) == 0
    assert cli.main([*words, "student.wer >= 0 and data.quarantined == 0"]) == 1
    assert "true, so this fails" in capsys.readouterr().err
    assert cli.main([*words, "student.gap_recovered > 0"]) == 2
    assert "student.gap_recovered is not defined in this report" in capsys.readouterr().err
