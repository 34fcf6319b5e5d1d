"""The recipe's own script: data folders by speaker, and what is wrong with a corpus."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd import cli
from asr_kd.files import read_json
from asr_kd.shards.tarset import read_shard
from pipelines.speechocean762 import corpus, labels
from tests import stages

ROOT = Path(__file__).parents[2]


def lay_out(root: Path, name: str, speakers: range) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    said = [(f"{speaker:04d}{number}", f"{speaker:04d}") for speaker in speakers for number in range(2)]
    (folder / "wav.scp").write_text("".join(f"{key}\tWAVE/SPEAKER{speaker}/{key}.WAV\n" for key, speaker in said))
    (folder / "utt2spk").write_text("".join(f"{key}\t{speaker}\n" for key, speaker in said))
    (folder / "text").write_text("".join(f"{key}\tTHE CAT {key}\n" for key, _ in said[:-1]) + f"{said[-1][0]}\n")
    for file in ("spk2age", "spk2gender"):
        (folder / file).write_text(
            "".join(f"{speaker:04d}\t{6 if file == 'spk2age' else 'f'}\n" for speaker in speakers)
        )


@pytest.fixture
def official(tmp_path: Path) -> Path:
    lay_out(tmp_path / "speechocean762", "train", range(3))
    lay_out(tmp_path / "speechocean762", "test", range(10, 18))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, output: Path, *more: str) -> None:
    words = [
        "--corpus",
        str(folder),
        "--output",
        str(output),
        "--unlabelled-speakers",
        "4",
        "--development-speakers",
        "2",
        *more,
    ]
    monkeypatch.setattr(sys, "argv", ["corpus.py", *words])
    corpus.main()


def speakers(output: Path, name: str) -> set[str]:
    return {line.split("\t")[1] for line in (output / name / "utt2spk").read_text().splitlines()}


def test_no_speaker_is_in_two_sets_and_none_is_lost(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parted = {}
    for split in ("0", "1"):
        output = official / f"sets{split}"
        run(monkeypatch, official, output, "--split", split)
        parted[split] = [speakers(output, name) for name in corpus.SETS]
        assert [len(each) for each in parted[split]] == [3, 4, 2, 2]
        assert set.union(*parted[split][1:]) == {f"{speaker:04d}" for speaker in range(10, 18)}
        for name in corpus.SETS:
            rows = {
                file: (output / name / file).read_text().splitlines()
                for file in (*corpus.BY_UTTERANCE, *corpus.BY_SPEAKER)
            }
            assert len({len(rows[file]) for file in corpus.BY_UTTERANCE}) == 1
            assert {line.split("\t")[0] for line in rows["spk2age"]} == speakers(output, name)
            assert all(Path(line.split("\t")[1]).is_relative_to(official) for line in rows["wav.scp"])
    assert parted["0"] != parted["1"]


def test_the_oracle_knows_what_the_unlabelled_speakers_said(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, official, official / "sets")
    texts = (official / "sets" / "unlabelled" / "text").read_text().splitlines()
    oracle = [json.loads(line) for line in (official / "sets" / "unlabelled-oracle.jsonl").read_text().splitlines()]
    said = [line.split("\t") for line in texts]
    assert [(one["key"], one["text"]) for one in oracle] == [(key, text) for key, text in said if text]


def test_sets_that_are_there_already_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first, name in enumerate(corpus.SETS):
        lay_out(tmp_path, name, range(10 * first, 10 * first + 1 + first))
    run(monkeypatch, tmp_path, tmp_path / "sets")
    assert [len(speakers(tmp_path / "sets", name)) for name in corpus.SETS] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "test" / "wav.scp").unlink(), "holds no train/wav.scp and test/wav.scp"),
        (lambda root: (root / "test" / "spk2age").unlink(), "spk2age"),
        (lambda root: (root / "test" / "utt2spk").write_text("00100\t0010\n"), "names no speaker of 00101; download the corpus again"),
        (lambda root: (root / "train" / "utt2spk").write_text("00000\n"), "utt2spk, line 1: nothing stands behind 00000"),
    ],
)  # fmt: skip
def test_what_is_not_the_corpus_is_refused_in_a_sentence(
    official: Path, monkeypatch: pytest.MonkeyPatch, damage: object, said: str
) -> None:
    damage(official / "speechocean762")  # type: ignore[operator]
    with pytest.raises(SystemExit, match=said):
        run(monkeypatch, official, official / "sets")


def test_too_few_speakers_are_named(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="leave a set empty: 8 are to be parted; ask for less"):
        run(monkeypatch, official, official / "sets", "--unlabelled-speakers", "7")
    with pytest.raises(SystemExit, match="-1 unlabelled and 2 development speakers leave a set empty"):
        run(monkeypatch, official, official / "sets", "--unlabelled-speakers", "-1")
    with pytest.raises(SystemExit, match="split: -1 is below 0"):
        run(monkeypatch, official, official / "sets", "--split", "-1")
    run(monkeypatch, official, official / "sets")  # the folder is free


def test_the_labels_are_compared_with_the_text_that_was_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    (folder / "unlabelled").mkdir(parents=True)
    (folder / "unlabelled" / "utt2spk").write_text("a\tkid\nb\tkid\nc\told\nsilent\told\n")
    (folder / "unlabelled" / "spk2age").write_text("kid\t7\nold\t30\n")
    said = {"a": "THE CAT SAT", "b": "A DOG", "c": "GOOD MORNING TO YOU"}

    def write(name: str, lines: list[dict[str, object]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    write("corpus/unlabelled-oracle.jsonl", [{"key": key, "text": text} for key, text in said.items()])
    whisper = write(
        "whisper.jsonl",
        [{"key": "a", "text": "the cat", "avg_logprob": -0.2}, {"key": "c", "text": "good morning to you", "avg_logprob": -0.4}],
    )  # fmt: skip
    write("whisper.left-out.jsonl", [{"key": "b", "text": "dog dog", "avg_logprob": -1.4, "why": "avg_logprob"}])
    lists = [{"text": "a dog", "score": -1.0}, {"text": "dog", "score": -1.0}, {"text": "a", "score": -9.0}]
    own = write("own.jsonl", [{"key": "b", "text": "a dog", "nbest": lists}])
    words = ["--corpus", folder, "--whisper", whisper, "--own", own, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["labels.py", *map(str, words)])
    labels.main()
    found = {name: labels.Quality(**one) for name, one in json.loads((tmp_path / "out" / "labels.json").read_text()).items()}  # fmt: skip
    assert found["Whisper, all"] == (3, 1.0, pytest.approx(2 / 9), pytest.approx(2 / 5), 0.0)
    assert found["as `transcribe` keeps them"] == (2, pytest.approx(7 / 9), pytest.approx(1 / 7), pytest.approx(1 / 3), 0.0)  # fmt: skip
    assert found["-0.3 nat a token at least"] == (1, pytest.approx(3 / 9), pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0)  # fmt: skip
    assert found["the teacher from here, all"][:3] == (1, pytest.approx(2 / 9), 0.0)
    assert found["half of the list at least"].utterances == 0  # its two best are as probable, and there is a third
    assert "| Whisper, all" in capsys.readouterr().out


def test_rates_are_told_by_age_and_gender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # and what the script adds goes again
    measure = importlib.import_module("pipelines.speechocean762.measure")
    monkeypatch.chdir(tmp_path)
    first = measure.folder(0)
    for folder in (first / "report", first / "stages", first / "data" / "test"):
        folder.mkdir(parents=True)
    said = [("a", {"age": "7", "gender": "f"}, "the cat sat"), ("b", {"age": "30", "gender": "m"}, "a dog")]
    lines = [
        {"key": key, "fields": fields, "system": "student-supervised", "reference_scored": text, "hypothesis_scored": text.replace("cat", "bat")}
        for key, fields, text in said
    ]  # fmt: skip
    (first / "report" / "utterances.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (first / "whisper-test.jsonl").write_text(json.dumps({"key": "a", "text": "The cat sat."}) + "\n")
    (first / "stages" / "whisper-test.json").write_text("{}")
    (first / "student-supervised").mkdir()
    found = measure.systems_of(first, "report")
    assert found["student-supervised"]["all"] == pytest.approx(1 / 5)
    assert (found["student-supervised"]["children"], found["student-supervised"]["male"]) == (pytest.approx(1 / 3), 0.0)
    assert found["student-supervised"]["characters"] == pytest.approx(1 / 16)  # a space is one
    assert (found["Whisper"]["all"], found["Whisper"]["adults"]) == (pytest.approx(2 / 5), 1.0)
    measure.print_table("system", [found, found])
    assert "| student-supervised | 20.0 | 20.0 / 20.0 |" in capsys.readouterr().out
    measure.take_over(1)
    taken = {str(path.relative_to(measure.folder(1))) for path in measure.folder(1).rglob("*") if path.is_file()}
    assert (
        taken == {"whisper-test.jsonl", "stages/whisper-test.json"}
        and not (measure.folder(1) / "student-supervised").exists()
    )


def test_the_recipe_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From data folders to the reports, with a random Whisper and a few of the embedded digits."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from tests.outside import only_letters, save_whisper

    monkeypatch.chdir(ROOT)
    stages.here(monkeypatch)
    samples = read_shard(ROOT / "data_manifests/digits/shard-000004.tar")
    speakers = {"labelled": range(4), "unlabelled": range(4, 8), "development": range(8, 10), "test": range(10, 12)}
    for name, of_set in speakers.items():
        lay_out(tmp_path / "corpus", name, of_set)
        folder, texts = tmp_path / "corpus" / name, []
        for line in (folder / "wav.scp").read_text().splitlines():
            key, place = line.split("\t")
            sample = next(samples)
            sound, rate = soundfile.read(io.BytesIO(sample.audio))
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / place, np.repeat(np.tile(sound, 8), 2), 2 * rate, format="WAV")
            texts.append(f"{key}\t{sample.fields['text'].upper()}\n")
        (folder / "text").write_text("".join(texts))
        scp = (folder / "wav.scp").read_text().replace("\tWAVE", f"\t{folder}/WAVE")
        (folder / "wav.scp").write_text(scp)
    save_whisper(tmp_path / "whisper")
    only_letters(tmp_path / "whisper", "e")  # of one letter even a random Whisper is sure
    run = tmp_path / "run"
    passes = [f"{name}_passes=1" for name in ("labelled", "teacher", "all", "both")]
    words = [
        f"corpus={tmp_path / 'corpus'}",
        f"whisper={tmp_path / 'whisper'}",
        f"run={run}",
        "jobs=1",
        "precision=float32",
        *passes,
    ]
    assert cli.main(["run", "pipelines/speechocean762", *words]) == 0
    for report in ("report", "report-lm"):
        systems = read_json(run / report / "report.json")["systems"]
        assert list(systems) == ["teacher", *(f"student-{name}" for name in ("supervised", "own", "whisper", "both", "textless", "oracle"))]  # fmt: skip
        assert all(one["words"] == 4 for one in systems.values())
    assert "student-own" in (run / "table" / "table.md").read_text()
    assert "the teacher from here, all" in (run / "labels" / "labels.md").read_text()
