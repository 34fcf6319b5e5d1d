"""The recipe of long recordings: what is composed lies where the lists say, cuts and labels are scored by it, and its pipeline is sound."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import yaml

from asr_kd.config.load import build, load_yaml
from asr_kd.decoding.wer import word_errors
from asr_kd.pipeline import load_pipeline
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.training.settings import TrainSettings

ROOT = Path(__file__).parents[2]
RATE = 16000


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    folder = ROOT / "pipelines" / "long"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name in ("score", "measure"):  # what a script of another recipe has left
            patch.delitem(sys.modules, name, raising=False)
        found = {"score": importlib.import_module("score")}
        for name in ("compose", "measure"):  # other recipes have scripts of these names
            spec = importlib.util.spec_from_file_location(f"long_{name}", folder / f"{name}.py")
            assert spec and spec.loader
            found[name] = module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
        yield found
        for name in ("score", "measure"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six utterances of a second of sound each, with quiet before and behind it and a click in front."""
    folder = tmp_path_factory.mktemp("utterances")
    lines = []
    for number in range(6):
        rng = np.random.default_rng(number)
        sound = rng.normal(0, 1e-4, 2 * RATE)
        sound[RATE // 2 : RATE // 2 + RATE] += rng.normal(0, 0.1, RATE)
        sound[1600:1920] += 0.05
        soundfile.write(folder / f"u{number}.wav", sound, RATE)
        lines.append(
            {"audio": f"u{number}.wav", "key": f"u{number}", "speaker": f"s{number % 2}", "text": f"word {number}"}
        )
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "silent.jsonl").write_text("".join(json.dumps({**line, "text": None}) + "\n" for line in lines))
    return folder / "all.jsonl"


def run(compose: ModuleType, output: Path, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compose.py", "--output", str(output), *map(str, arguments)])
        compose.main()


@pytest.fixture(scope="module")
def composed(scripts: dict[str, ModuleType], manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("long") / "made"
    run(scripts["compose"], output, "--manifest", manifest, "--minutes", 0.2, "--seed", 3)
    return output


def lines(file: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_utterance_lies_where_the_list_says(composed: Path, manifest: Path) -> None:
    said = lines(composed / "reference.jsonl")
    assert sorted(one["key"] for one in said) == [f"u{number}" for number in range(6)]
    recordings = {one["key"]: one for one in lines(composed / "recordings.jsonl")}
    assert len(recordings) > 1
    for key, recording in recordings.items():
        own = [one for one in said if one["recording"] == key]
        assert recording["text"] == " ".join(one["text"] for one in own)
        sound, _ = soundfile.read(composed / recording["audio"])
        ends = [0.0]
        for one in own:
            given, _ = soundfile.read(manifest.parent / f"{one['key']}.wav")
            there = sound[round(one["start"] * RATE) : round(one["end"] * RATE)]
            assert np.corrcoef(given, there)[0, 1] > 0.99
            assert [at - one["start"] for at in one["speech"]] == pytest.approx([0.5, 1.5], abs=0.02)
            assert 0.2 <= one["start"] - ends[-1] <= 4.0
            ends.append(one["end"])
    assert lines(composed / "between.jsonl") == []


def test_the_seed_decides_and_noise_and_stretches_leave_the_order(
    scripts: dict[str, ModuleType], composed: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts["compose"], "EVERY", 1)  # a stretch before each utterance
    compose, same = scripts["compose"], ["--manifest", manifest, "--minutes", 0.2, "--seed", 3]
    run(compose, tmp_path / "again", *same)
    for file in composed.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    silent = ["--manifest", manifest.with_name("silent.jsonl"), "--texts", manifest, *same[2:]]
    run(compose, tmp_path / "between", *silent, "--stretches", "--snr", 15)
    before, behind = (lines(folder / "reference.jsonl") for folder in (composed, tmp_path / "between"))
    assert [(one["key"], one["text"]) for one in before] == [(one["key"], one["text"]) for one in behind]
    between = lines(tmp_path / "between" / "between.jsonl")
    assert len(between) == 6 and {one["kind"] for one in between} <= set(compose.KINDS)
    assert all(5.0 <= one["end"] - one["start"] <= 20.0 for one in between)
    run(compose, tmp_path / "other", *same[:-1], 4)
    assert [one["key"] for one in lines(tmp_path / "other" / "reference.jsonl")] != [one["key"] for one in before]


def test_what_cannot_be_composed_is_one_sentence(
    scripts: dict[str, ModuleType], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["--manifest", manifest.with_name("silent.jsonl")], "u0 has no text, by which cuts are scored; give --texts"),
        (["--manifest", manifest, "--minutes", 0], "--minutes: 0 cannot be composed"),
        (["--manifest", tmp_path / "none.jsonl"], "none.jsonl"),
    ):
        with pytest.raises(SystemExit):
            run(scripts["compose"], tmp_path / "made", *arguments)
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1


def test_pieces_and_utterances_that_overlap_are_one_group(scripts: dict[str, ModuleType]) -> None:
    score = scripts["score"]

    def spans(*bounds: tuple[float, float], recording: str = "a") -> list[object]:
        return [score.Span(recording, *one, f"{recording}-{one[0]:g}") for one in bounds]

    said = spans((1, 2), (3, 5), (6, 7), (8, 9), (10, 11), (20, 21), (30, 32)) + spans((1, 2), recording="b")
    pieces = spans((0.9, 2.2), (2.9, 4), (4, 5.2), (5.9, 9.1), (9.5, 9.9), (10.3, 11.1), (29, 31), (31, 33))
    groups = score.grouped(said, pieces)
    assert [group.kind for group in groups] == ["whole", "split", "merged", "empty", "clipped", "lost", "split", "lost"]
    cuts = score.cuts_of(groups, [score.Span("a", 9.6, 9.8, "music")])
    assert cuts.share == {
        "whole": 1 / 8,
        "clipped": 1 / 8,
        "split": 2 / 8,
        "merged": 2 / 8,
        "tangled": 0,
        "lost": 2 / 8,
    }
    assert cuts.pieces == 8 and cuts.empty == {"music": 1} and cuts.empty_seconds == pytest.approx(0.4)
    assert (cuts.speech, cuts.left_out) == pytest.approx((10, 2.3))
    assert cuts.kept == pytest.approx(sum(one.end - one.start for one in pieces) - 7.7)  # type: ignore[attr-defined]
    assert cuts.starts == pytest.approx([0.1, -0.3]) and cuts.ends == pytest.approx([0.2, 0.1])
    # one utterance in two pieces, of which one holds another utterance too
    assert [group.kind for group in score.grouped(spans((0, 3), (4, 5)), spans((0, 2), (2, 6)))] == ["tangled"]


def test_the_words_of_a_group_are_compared_as_one(scripts: dict[str, ModuleType]) -> None:
    score = scripts["score"]
    said, pieces = [score.Span("a", 1, 4, "u"), score.Span("a", 8, 9, "v")], [score.Span("a", *one, f"p{one[0]}") for one in ((1, 2), (2, 4), (5, 6))]  # fmt: skip
    errors = score.errors_of(score.grouped(said, pieces), {"u": "One two, three", "v": "four"}, {"p1": "one", "p2": "two tree", "p5": "oh"})  # fmt: skip
    assert {kind: (one.words, one.substitutions, one.deletions, one.insertions) for kind, one in errors.items()} == {
        "split": (3, 1, 0, 0), "lost": (1, 0, 1, 0), "empty": (0, 0, 0, 1),
    }  # fmt: skip


def test_a_detector_finds_the_utterances(scripts: dict[str, ModuleType], composed: Path, tmp_path: Path) -> None:
    score = scripts["score"]
    said, texts = score.read_reference(composed)
    found = {}
    for cut, listed in scripts["measure"].CUTS.items():
        if listed.get("detector") == "silero":  # hears no speech in noise
            continue
        manifest = composed / ("recordings.jsonl" if listed else "reference.jsonl")
        settings = {"manifest": str(manifest), "output": str(tmp_path / cut), "drop_text": True}
        prepare(build(PrepareSettings, settings | ({"segment": listed} if listed else {}), cut))
        found[cut] = score.grouped(said, score.read_pieces(tmp_path / cut, composed))
        assert [group.kind for group in found[cut]] == ["whole"] * 6
    labels = {group.pieces[0].key: texts[group.utterances[0].key] for group in found["energy"]}
    assert score.errors_of(found["energy"], texts, labels)["whole"].errors == 0
    assert all(0.15 < seconds < 0.7 for seconds in score.cuts_of(found["energy"], []).starts)


def test_the_pipeline_is_sound_and_students_differ_in_what_they_hear(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    measure = scripts["measure"]
    recipe = load_yaml(ROOT / "pipelines" / "an4" / "pipeline.yaml")
    stages = measure.stages(recipe, [*measure.STUDENTS, "noise-silero"])
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"variables": recipe["variables"], "stages": stages}, sort_keys=False))
    _, loaded = load_pipeline(file, [])
    needs = {stage.name: set(stage.needs) for stage in loaded}
    assert {"long-unlabelled-noise-silero", "lists-noise-silero", "student-supervised"} <= needs["student-noise-silero"]
    assert needs["lists-noise-silero"] == {"teacher", "text", "long-unlabelled-noise-silero"}
    assert (
        "long-unlabelled-noise" in needs["long-unlabelled-noise-truth"]
        and "unlabelled" not in needs["student-noise-silero"]
    )
    assert {"test", "long-test-clean-uncut", "long-test-between-truth", "student-clean-silero"} <= needs["report-long"]
    # the stages of an4 are its own, so that what was trained there is taken over
    _, own = load_pipeline(ROOT / "pipelines" / "an4" / "pipeline.yaml", [])
    prints = {stage.name: stage.fingerprint for stage in own}
    same = [stage for stage in loaded if stage.name in prints]
    assert len(same) == 12 and all(stage.fingerprint == prints[stage.name] for stage in same)
    given, cut = (
        build(TrainSettings, next(one.settings for one in loaded if one.name == name), name).model_dump()
        for name in (measure.GIVEN, "student-clean-silero")
    )
    heard = cut["phases"][0]["sources"][0]
    assert (heard["audio"], heard["transcripts"]) == ("runs/an4/long/unlabelled-clean-silero", "runs/an4/long/unlabelled-clean-silero.jsonl")  # fmt: skip
    for settings in (given, cut):
        settings.pop("output")
        for name in ("audio", "transcripts"):
            settings["phases"][0]["sources"][0].pop(name)
        for name in ("passes", "hours_at_least"):
            settings["phases"][0].pop(name)
    assert given == cut


def test_the_tables_say_what_was_measured(
    scripts: dict[str, ModuleType],
    composed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = scripts["measure"]
    monkeypatch.setattr(measure, "CONDITIONS", {"clean": []})
    monkeypatch.setattr(measure, "CUTS", {"silero": {"detector": "energy"}})
    texts = scripts["score"].read_reference(composed)[1]
    for name in ("unlabelled", "test"):
        folder = tmp_path / "long" / f"{name}-clean"
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(composed)
        cut = tmp_path / "long" / f"{name}-clean-silero"
        prepare(
            PrepareSettings(
                manifest=str(folder / "recordings.jsonl"),
                output=str(cut),
                drop_text=True,
                segment={"detector": "energy"},
            )
        )  # type: ignore[arg-type]
        groups = measure.groups(tmp_path, name, "clean", "silero")[0]
        labels = {group.pieces[0].key: texts[group.utterances[0].key].replace("3", "4") for group in groups}
        for system in ("", *(f"-{one}" for one in measure.tested([]))):
            write(tmp_path / "long" / f"{name}-clean-silero{system}.jsonl", labels)
    write(tmp_path / "teacher-lists.jsonl", texts | {"u0": "word"})
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / "unlabelled-oracle.jsonl", texts)
    sets = {name: {"wer": wer} for name, wer in (("given", 0.25), ("clean-truth", 0.3), ("clean-uncut", 0.9))}
    (tmp_path / "report-long").mkdir()
    (tmp_path / "report-long" / "report.json").write_text(json.dumps({"systems": {name: {"sets": sets} for name in measure.tested([])}}))  # fmt: skip
    measure.print_cuts([tmp_path])
    measure.print_labels([tmp_path, tmp_path])
    measure.print_systems([tmp_path], [])
    printed = capsys.readouterr().out
    assert "| clean | silero | 1.00 | 100.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |" in printed
    assert "| as given | – | 8.3 | 8.3 / 8.3 |" in printed
    wrong = sum(word_errors("word 3", "word 4")) / 12
    assert f"| clean | silero | {100 * wrong:.1f} | {100 * wrong:.1f} / {100 * wrong:.1f} | +0.0 %" in printed
    assert f"| student-distilled | 25.0 | 30.0 | {100 * wrong:.1f} | 90.0 |" in printed


def write(file: Path, texts: dict[str, str]) -> None:
    file.write_text("".join(json.dumps({"key": key, "text": text}) + "\n" for key, text in texts.items()))
