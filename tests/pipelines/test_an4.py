"""The recipe of AN4: the corpus in every form in which it is had, four sets, and the settings that all recipes share."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from asr_kd import cli
from asr_kd.audio.decode import decode
from asr_kd.decoding.prepare import prepare
from asr_kd.pipeline import load_pipeline
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import Sample, read_checked, read_index

ROOT = Path(__file__).parents[2]
SPEAKERS = ("fash", "fbbh", "mblb", "mmxg", "fejs")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"an4_{name}", ROOT / "pipelines" / "an4" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"an4_{name}"] = module
    found = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = found  # scripts of other recipes have names that are looked for there
    return module


def speech(seconds: float, seed: int) -> np.ndarray:
    """int16: loud and smooth, as the wrong byte order is not."""
    time = np.arange(int(16000 * seconds)) / 16000
    return (8000 * np.sin(2 * np.pi * (200 + 37 * seed) * time)).astype(np.int16)


def sphere(samples: np.ndarray) -> bytes:
    fields = (
        f"NIST_1A\n   1024\nsample_count -i {len(samples)}\nsample_n_bytes -i 2\nchannel_count -i 1\n"
        "sample_byte_format -s2 01\nsample_rate -i 16000\nsample_coding -s3 pcm\nend_head\n"
    )
    return fields.encode().ljust(1024, b" ") + samples.astype("<i2").tobytes()


def make_corpus(root: Path, form: str) -> Path:
    """Five speakers of two utterances for training, one for test; each utterance a second, and its text in the official form."""
    (root / "etc").mkdir(parents=True)
    for part, folder, speakers in (("train", "an4_clstk", SPEAKERS), ("test", "an4test_clstk", ("fcaw",))):
        names, texts = [], []
        for number, speaker in enumerate(speakers):
            for take in range(2):
                key = f"an{number}{take}-{speaker}-b"
                names.append(f"{folder}/{speaker}/{key}")
                text = "YES" if take else f"{'ABCDE'[number]} SIXTY"
                texts.append(f"<s> {text} </s> ({key})" if part == "train" else f"{text} ({key})")
                file = root / "wav" / folder / speaker / key
                file.parent.mkdir(parents=True, exist_ok=True)
                samples = speech(1.0, 2 * number + take)
                match form:
                    case "sph":
                        file.with_suffix(".sph").write_bytes(sphere(samples))
                    case "raw-big":
                        file.with_suffix(".raw").write_bytes(samples.astype(">i2").tobytes())
                    case "raw-little":
                        file.with_suffix(".raw").write_bytes(samples.astype("<i2").tobytes())
                    case _:
                        soundfile.write(file.with_suffix(f".{form}"), samples, 16000)
        (root / "etc" / f"an4_{part}.fileids").write_text("\n".join(names) + "\n")
        (root / "etc" / f"an4_{part}.transcription").write_text("\n".join(texts) + "\n")
    return root


def run(folder: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [str(ROOT / "pipelines/an4/corpus.py"), "--corpus", str(folder), "--output", str(output)]
    sizes = ["--labelled-minutes", "0.05", "--development-speakers", "1"]
    return subprocess.run(
        [sys.executable, *words, *sizes, *more], check=False, capture_output=True, text=True, cwd=ROOT
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("form", ["sph", "flac", "wav", "raw-big", "raw-little"])
def test_the_corpus_in_every_form(form: str, tmp_path: Path) -> None:
    make_corpus(tmp_path / "an4", form)
    done = run(tmp_path, tmp_path / "out")  # the folder above it will do
    assert done.returncode == 0, done.stderr
    sets = {
        name: lines(tmp_path / "out" / f"{name}.jsonl") for name in ("labelled", "unlabelled", "development", "test")
    }
    assert {name: len(found) for name, found in sets.items()} == {
        "labelled": 4, "unlabelled": 4, "development": 2, "test": 2,
    }  # fmt: skip
    speakers = {name: {line["speaker"] for line in found} for name, found in sets.items()}
    assert speakers["test"] == {"fcaw"} and set.union(*speakers.values()) == {*SPEAKERS, "fcaw"}
    assert sum(map(len, speakers.values())) == 6  # no speaker is in two sets
    assert not any("text" in line for line in sets["unlabelled"])
    oracle = {line["key"]: line["text"] for line in lines(tmp_path / "out" / "unlabelled-oracle.jsonl")}
    assert set(oracle) == {line["key"] for line in sets["unlabelled"]}
    for line in sets["labelled"]:
        assert line["text"] in ("yes", f"{'abcde'[SPEAKERS.index(line['speaker'])]} sixty")
        waveform, _ = decode(Path(line["audio"]).read_bytes(), line["key"], 16000, 10.0)
        number, take = int(line["key"][2]), int(line["key"][3])
        np.testing.assert_allclose(waveform, speech(1.0, 2 * number + take) / 32768, atol=1e-6)
    said = json.loads((tmp_path / "out" / "sets.json").read_text())
    assert said["sets"]["labelled"] == {"utterances": 4, "speakers": 2, "minutes": 0.07, "words": 6}
    assert said["sentences"]["test said in labelled"] == 1 + ("fash" in speakers["labelled"])


def test_a_split_is_drawn_by_its_number_alone(tmp_path: Path) -> None:
    make_corpus(tmp_path / "an4", "flac")
    for name, split in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run(tmp_path / "an4", tmp_path / name, "--split", split).returncode == 0
    one, same, other = ((tmp_path / name / "labelled.jsonl").read_text() for name in "abc")
    assert one == same != other
    assert (tmp_path / "a" / "test.jsonl").read_text() == (tmp_path / "c" / "test.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "etc/an4_train.fileids").unlink(), "holds no etc/an4_train.fileids; give the folder of CMU AN4"),
        (lambda root: next((root / "wav/an4_clstk/fash").iterdir()).unlink(), "no recording"),
        (lambda root: (root / "etc/an4_test.transcription").write_text("YES (other)\n"), "has no text of an00-fcaw-b"),
        (lambda root: (root / "etc/an4_test.transcription").write_text("YES\n"), "line 1: not `TEXT \\(utterance\\)`"),
        (lambda root: next((root / "wav/an4_clstk/fash").iterdir()).write_bytes(b"x"), "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(change: Any, message: str, tmp_path: Path) -> None:
    change(make_corpus(tmp_path / "an4", "flac"))
    done = run(tmp_path / "an4", tmp_path / "out")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr


def test_too_few_speakers_for_three_sets(tmp_path: Path) -> None:
    make_corpus(tmp_path / "an4", "flac")
    done = run(tmp_path / "an4", tmp_path / "out", "--development-speakers", "4")
    assert done.returncode == 1 and "leave a set empty: the training set has 5 speakers" in done.stderr


def settings_of(recipe: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "pipelines" / recipe / "pipeline.yaml").read_text()))


def test_the_recipe_is_that_of_ones_own_audio() -> None:
    own, an4 = settings_of("own_audio"), settings_of("an4")
    for name in set(own["stages"]) - {"labelled", "unlabelled", "development", "test", "report", "report-conditions"}:
        one, other = own["stages"][name], an4["stages"][name]
        heard = one["settings"].pop("features", {})
        heard.pop("sample_rate", None)  # the rate of the audio
        assert heard == other["settings"].pop("features", {}) and one == other, name
    shared = set(own["variables"]) & set(an4["variables"]) - {"run", "units_size"}
    assert {name: own["variables"][name] for name in shared} == {name: an4["variables"][name] for name in shared}


def test_noise_is_one_variable_of_every_recipe_and_leaves_the_teacher_alone() -> None:
    for recipe in ("an4", "own_audio", "digits"):
        file = ROOT / "pipelines" / recipe / "pipeline.yaml"
        noisy, quiet = (
            {stage.name: stage.fingerprint for stage in load_pipeline(file, [f"noise={value}"])[1]}
            for value in ("{}", "null")
        )
        changed = {name for name in noisy if noisy[name] != quiet[name] and not name.startswith("report")}
        students = {name for name in noisy if name.startswith("student-")} - {"student-supervised"}
        assert changed == students and changed, recipe


def test_a_test_set_in_every_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_corpus(tmp_path / "an4", "flac")
    assert run(tmp_path / "an4", tmp_path / "corpus").returncode == 0
    for name in ("test", "development"):
        settings = PrepareSettings(manifest=str(tmp_path / f"corpus/{name}.jsonl"), output=str(tmp_path / name))
        prepare(settings)
    script = load_script("conditions")
    words = ["--audio", str(tmp_path / "test"), "--voices", str(tmp_path / "development")]

    def made(output: str, *more: str) -> list[Sample]:
        monkeypatch.setattr("sys.argv", ["conditions.py", *words, "--output", str(tmp_path / output), *more])
        script.main()
        return [one for info in read_index(tmp_path / output) for one in read_checked(tmp_path / output, info)]

    plain = {one.key: one for info in read_index(tmp_path / "test") for one in read_checked(tmp_path / "test", info)}
    heard = made("conditions")
    assert len({one.key for one in heard}) == len(heard) == len(script.CONDITIONS) * len(plain)
    for one in heard:
        condition = one.fields["condition"]
        before = plain[one.key.removeprefix(condition.replace(" ", "-") + "-")]
        assert {**before.fields, "condition": condition} == one.fields
        (was, rate), (now, same) = (decode(sample.audio, sample.key, None, 60) for sample in (before, one))
        assert rate == same == 16000 and was.shape == now.shape
        assert np.array_equal(was, now) == (condition == "clean")
    assert {one.fields["condition"] for one in heard} == set(script.CONDITIONS)
    again = made("again", "--minutes", "0.001")  # one utterance of each shard, and the same noise
    assert len(again) == len(script.CONDITIONS) and all(one in heard for one in again)
    with pytest.raises(SystemExit):
        made("none", "--minutes", "0")


def test_all_stages_of_the_recipe_are_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "an4", "flac")
    assert (
        cli.main(
            ["run", str(ROOT / "pipelines/an4"), f"corpus={tmp_path / 'an4'}", f"run={tmp_path / 'run'}", "--dry-run"]
        )
        == 0
    )
    assert "student-distilled " in capsys.readouterr().out


def test_what_is_measured_beside_the_recipe_hears_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    measure = load_script("measure")
    recipe = settings_of("an4")
    stages = {}
    for name in ("with_parts", "digits", "without_oracle", "with_noisy"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(getattr(measure, name)(recipe), sort_keys=False))
        stages[name] = {stage.name: stage for stage in load_pipeline(file, [])[1]}
    assert recipe == settings_of("an4")  # nothing of it was changed in passing
    known = {stage.name: stage.fingerprint for stage in load_pipeline(ROOT / "pipelines/an4/pipeline.yaml", [])[1]}
    for name in ("with_parts", "without_oracle", "with_noisy"):  # what both have is not run twice
        shared = {
            one: stage.fingerprint
            for one, stage in stages[name].items()
            if one in known and not one.startswith("report")
        }
        assert shared.items() <= known.items() and len(shared) > 12
    assert "student-oracle" not in stages["without_oracle"] and "corpus" not in stages["digits"]
    assert "data" in stages["digits"]["report-conditions"].needs and "test-conditions" not in stages["digits"]
    for kind in ("student-pseudo-label", "student-distilled"):
        quiet, noisy = (stages["with_noisy"][name].settings for name in (kind, f"{kind}-noise"))
        for source in noisy["phases"][0]["sources"]:
            assert source["augment"].pop("noise") and source["augment"]
        for source in quiet["phases"][0]["sources"]:
            assert source["augment"].pop("noise") is None
        assert {**noisy, "output": ""} == {**quiet, "output": ""}  # nothing else differs
    rival = stages["with_parts"]["student-pseudo-label"].settings["phases"][0]
    for name, stage in stages["with_parts"].items():
        if name not in known and stage.verb == "train" and not name.startswith("student-best-of-lists-"):
            phase = stage.settings["phases"][0]
            halves = 2 if name.endswith("two-rounds") else 1
            assert phase["hours_at_least"] * halves == pytest.approx(rival["hours_at_least"]), name
            assert [source["audio"] for source in phase["sources"]] == [source["audio"] for source in rival["sources"]]


def test_parts_of_the_unlabelled_audio_are_nested_and_heard_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    measure, recipe, run = load_script("measure"), settings_of("an4"), tmp_path / "run"
    (run / "corpus").mkdir(parents=True)
    rows = [{"audio": f"{speaker}-{number}.flac", "key": f"{speaker}-{number}", "speaker": speaker} for speaker in "abcdefgh" for number in range(3)]  # fmt: skip
    (run / "corpus" / "unlabelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "amounts.yaml").write_text(
        yaml.safe_dump(measure.amounts(recipe, run, "other", "texts.jsonl"), sort_keys=False)
    )
    assert recipe == settings_of("an4")
    stages = {stage.name: stage for stage in load_pipeline(tmp_path / "amounts.yaml", [f"run={run}"])[1]}
    own = {stage.name: stage for stage in load_pipeline(ROOT / "pipelines/an4/pipeline.yaml", [f"run={run}"])[1]}
    assert {name: stages[name].fingerprint for name in own if name in stages} == {
        name: stage.fingerprint for name, stage in own.items() if name in stages
    }
    assert "student-distilled" in stages and "student-oracle" not in stages
    heard = {}
    for part in ("quarter", "half"):
        phase = stages[f"student-{part}"].settings["phases"][0]
        prepared = stages[f"unlabelled-{part}"].settings
        assert prepared["output"] == phase["sources"][0]["audio"] and prepared["drop_text"]
        lines = list(map(json.loads, Path(prepared["manifest"]).read_text().splitlines()))
        heard[part] = {line["key"] for line in lines}
        assert all(Path(line["audio"]).is_absolute() for line in lines)
        assert phase["hours_at_least"] == own["student-distilled"].settings["phases"][0]["hours_at_least"]
    assert len(heard["quarter"]) == 6 and len(heard["half"]) == 12 and heard["quarter"] < heard["half"]
    said = {}
    for name in ("student-other", "student-other-texts"):
        _, said[name], _ = phase = stages[name].settings["phases"][0]["sources"]
        assert [source["audio"] for source in phase] == [
            str(run / "data" / name) for name in ("unlabelled", "other", "labelled")
        ]
    own_words, told = said.values()
    assert (told["transcripts"], told["ctc"], told["sequences"]) == ("texts.jsonl", 1.0, None) and own_words[
        "sequences"
    ]
    assert told["augment"] == own_words["augment"]
    assert stages["other-lists"].settings["lexicon"] == stages["teacher-lists"].settings["lexicon"]


def test_paired_differences() -> None:
    measure = load_script("measure")
    # -1, -2 and -3 points of 10: mean -20 %, standard deviation 10 %, t of two degrees of freedom 4.303
    assert measure.paired([0.09, 0.08, 0.07], [0.1, 0.1, 0.1]) == "-20.0 % (-44.8 to +4.8)"
    assert measure.paired([0.09], [0.1]) == "-10.0 %"
