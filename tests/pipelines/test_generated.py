"""The recipe of students without audio: its pipeline, and recordings that are cut into words and joined anew."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml

from asr_kd.audio.decode import decode
from asr_kd.config.load import build
from asr_kd.pipeline import load_pipeline
from asr_kd.shards.tarset import Sample, read_index, read_shard
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units, learn_units
from tests.training.conftest import PITCH, RATE, letters, sample, units, write_audio, write_targets

__all__ = ["letters", "units"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "pipelines" / "taxonomy"))
        found = {}
        for name in ("measure", "splice"):
            path = ROOT / "pipelines" / "generated" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"generated_{name}", path)
            assert spec and spec.loader
            found[name] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, found[name])  # dataclasses look there
            spec.loader.exec_module(found[name])
        yield SimpleNamespace(**found, arms=importlib.import_module("arms"))


def test_the_pipeline_is_sound_and_its_students_differ_in_what_they_hear_alone(
    script: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arms = list(script.arms.read_arms(script.measure.HERE / "arms.yaml").values())
    chosen = [(arm, value) for arm in arms for value in arm.values]
    stages = script.arms.stages_of("strong", 1, chosen, {"passes": 2})
    (tmp_path / "pipeline.yaml").write_text(
        yaml.safe_dump({"variables": {"run": str(tmp_path), "jobs": 2}, "stages": stages}, sort_keys=False)
    )
    _, loaded = load_pipeline(tmp_path / "pipeline.yaml", [])
    needs = {stage.name: set(stage.needs) for stage in loaded}
    assert needs["strong-1-moments"] == {"strong-data", "strong-1-teacher"}
    assert needs["strong-1-spliced"] == {"strong-data", "strong-1-units", "strong-1-alignment-labelled"}
    seconds = {}
    for arm, value in chosen:
        name = f"strong-1-{arm.stage(value)}"
        settings = build(TrainSettings, stages[name]["settings"], name)
        heard, labelled, *further = settings.phases[0].sources
        assert "strong-1-student-supervised" in needs[name] and "strong-1-soft-targets" not in needs[name]
        assert labelled.ctc == 1.0 and not labelled.teacher
        for source in (heard, *further):
            assert source.teacher and source.teacher.endswith("strong/seed1/teacher") and source.soft == 1.0
            assert source.augment == type(source.augment)() and source.knowledge()[0].name == "soft"
        assert len(further) == (arm.name == "real-and-adversarial")
        without = not any("unlabelled" in (source.audio or "") for source in (heard, *further))
        assert without == (not arm.name.startswith("real"))
        if generated := heard.generated:
            assert bool(generated.moments) == (arm.name != "white")
            assert bool(generated.moments) == ("strong-1-moments" in needs[name])
            seconds[arm.name] = generated.utterances * generated.seconds
    assert set(seconds.values()) == {18.25 * 60} and len(seconds) == 4  # a quarter of 73 minutes


def aligned(text: str, units: Units) -> SparsePosteriors:
    """Of the tones: the units of each from the middle of its sound on."""
    dense = np.full((8 * (2 * len(text) + 1) - 1, units.size), 1e-9)
    spikes = [8 * (2 * place + 1) + 4 for place in range(len(text))]
    path = np.zeros(len(dense), int)
    for spike, letter in zip(spikes, text, strict=True):
        for later, unit in enumerate(units.encode(letter)):
            path[spike + later] = unit
    dense[np.arange(len(dense)), path] = 1.0
    return SparsePosteriors.from_dense(np.log(dense / dense.sum(1, keepdims=True)), 1)


def spoken(text: str, seed: int, speaker: str) -> Sample:
    """Letters as words."""
    one = sample(f"u{seed}", text, seed, speaker=speaker)
    return Sample(one.key, one.audio, one.extension, {**one.fields, "text": " ".join(text)})


def test_words_are_cut_in_their_pauses_and_joined_with_their_text(
    script: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = learn_units(["a b", "b a", "a a b"] * 9, "unigram", 5)
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "units.model").write_bytes(words.model)
    assert all(words.starts_word(words.encode(letter)[0]) for letter in "ab")
    said = [spoken("abba", 0, "x"), spoken("bab", 1, "y"), spoken("ab", 2, "x"), spoken("a", 3, "y")]
    audio = write_audio(tmp_path / "audio", [said[:2], said[2:]])
    targets = write_targets_of(tmp_path / "alignment", audio, words)
    asked = ["--audio", audio, "--alignment", targets, "--units", str(tmp_path / "units"), "--minutes", "0.5"]
    for name in ("one", "same"):
        assert script.splice.main([*asked, "--output", str(tmp_path / name)]) == 0
    assert "from 10 words of 4 of 4 recordings\n" in capsys.readouterr().out
    assert script.splice.main([*asked, "--output", str(tmp_path / "other"), "--seed", "1"]) == 0
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in ("one", "same", "other")
    ]
    assert files[0] == files[1] != files[2]
    made = [one for info in read_index(tmp_path / "one") for one in read_shard(tmp_path / "one" / info.name)]
    seconds = sum(float(one.fields["seconds"]) for one in made)
    assert 30 <= seconds < 33 and {one.fields["speaker"] for one in made} == {"x", "y"}
    assert len({one.fields["text"] for one in made}) > 4  # more than were said
    for one in made:
        waveform, rate = decode(one.audio, one.key, RATE, 60.0)
        assert rate == RATE and one.fields["seconds"] == pytest.approx(len(waveform) / RATE, abs=1e-3)
        assert "".join(one.fields["text"].split()) == heard(waveform)


def heard(waveform: np.ndarray) -> str:
    """The tones of a sound, in order."""
    pieces = waveform[: len(waveform) // 240 * 240].reshape(-1, 240)
    loud = np.abs(pieces).max(1) > 0.2
    powers = np.abs(np.fft.rfft(pieces, axis=1))
    pitch = {letter: round(hertz * 240 / RATE) for letter, hertz in PITCH.items()}
    best = [
        max(pitch, key=lambda letter: power[pitch[letter]]) if on else ""
        for power, on in zip(powers, loud, strict=True)
    ]
    return "".join(letter for letter, _ in itertools.groupby(best) if letter)


def write_targets_of(folder: Path, audio: str, units: Units) -> str:
    """An alignment of a set of tones."""
    shards = [read_shard(Path(audio) / info.name) for info in read_index(audio)]
    wanted = {one.key: aligned("".join(one.fields["text"].split()), units) for shard in shards for one in shard}
    import tests.training.conftest as made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "soft_target", lambda item, *_: wanted[item.key])
        return write_targets(folder, audio, units)


def test_what_cannot_be_cut_is_counted_or_refused(
    script: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], units: Units, letters: Path
) -> None:
    splice: ModuleType = script.splice
    assert splice.spans([0, 0, 1, 1, 0, 1], units) == [(2, 5)]  # units within a word
    assert splice.quietest(np.array([1.0, 1, 1, 0, 0, 1, 1]), 0, 7, 2) == 4
    assert splice.words_of(np.zeros(800, np.float32), RATE, [1, 0, 1], 30, "a b c", units) == []
    audio = write_audio(tmp_path / "audio", [[sample("u0", "ab", 0)]])
    targets = write_targets(tmp_path / "alignment", audio, units)
    asked = ["--audio", audio, "--alignment", targets, "--units", str(letters), "--output", str(tmp_path / "out")]
    assert splice.main([*asked, "--minutes", "0"]) == 2
    assert "--minutes: 0 minutes cannot be made" in capsys.readouterr().err
    assert (
        splice.main([*asked[:-4], "--units", str(tmp_path), "--output", str(tmp_path / "out"), "--minutes", "1"]) == 2
    )
    assert "holds no units.model; make units" in capsys.readouterr().err
