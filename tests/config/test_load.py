from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asr_kd.audio.settings import AugmentSettings, FeatureSettings
from asr_kd.config.base import Settings
from asr_kd.config.load import build, load_yaml, override
from asr_kd.config.verbs import VERBS
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.settings import ModelSettings
from asr_kd.pipeline import PipelineSettings
from asr_kd.shards.settings import UnitsSettings
from asr_kd.training.settings import TrainSettings

TRAIN: dict[str, Any] = {
    "output": "run", "units": "units", "development": "dev",
    "phases": [{"sources": [{"audio": "shards", "ctc": 1.0}], "passes": 2}],
}  # fmt: skip


def yaml_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_yaml_and_overrides_make_settings(tmp_path: Path) -> None:
    path = yaml_file(
        tmp_path,
        "output: run\nunits: units\ndevelopment: dev\nphases:\n- {sources: [{audio: a, ctc: 1}], passes: 2}\nmodel: {kind: blstm}\n",
    )
    values = load_yaml(path)
    changed = override(
        values, ["model.layers=3", "phases.0.passes=5", "phases.0.sources.0.augment.stretch=0.1", "seed=7"]
    )
    settings = build(TrainSettings, changed, "here")
    assert (settings.model.kind, settings.model.layers, settings.seed) == ("blstm", 3, 7)
    assert settings.phases[0].passes == 5 and settings.phases[0].sources[0].augment.stretch == 0.1
    assert "seed" not in values and values["phases"][0]["passes"] == 2, "the file's values stay as they were"
    assert build(TrainSettings, settings.model_dump(), "again") == settings


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("5.E+2", 500.0), ("-2E3", -2000.0), ("0x1e3", 483), ("1e3a", "1e3a")]
)
def test_numbers_with_an_exponent_need_no_dot(tmp_path: Path, text: str, value: object) -> None:
    assert load_yaml(yaml_file(tmp_path, f"rate: {text}")) == {"rate": value}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.size=-3", "^command line: model.size: "),
        ("model.siez=3", "^command line: unknown key model.siez; did you mean size"),
        ("model={size: 0}", "^command line: model.size: "),
        ("seed=1", "^student.yaml: model.layers: "),
    ],
)
def test_a_mistake_is_blamed_on_where_it_was_made(assignment: str, message: str) -> None:
    phases = [{"sources": [{"audio": "a", "ctc": 1}], "passes": 2}]
    values = {"output": "run", "units": "units", "development": "dev", "phases": phases}
    if assignment == "seed=1":
        values["model"] = {"layers": 0}
    with pytest.raises(UserError, match=message):
        build(TrainSettings, override(values, [assignment]), "student.yaml", [assignment])


def test_empty_yaml_holds_no_settings(tmp_path: Path) -> None:
    assert load_yaml(yaml_file(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML in line 2"),
        ("a: b: c\n", "not valid YAML in line 1"),
        ("- a\n- b\n", "must hold `key: value` settings, not a list"),
        ("just words\n", "not a str"),
        ("a: \x01\n", "not valid YAML"),
        ("[" * 3000, "nested too deeply"),
        (b"a: \xff\xfe\n", "not UTF-8"),
    ],
)
def test_what_is_not_settings_yaml_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = yaml_file(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = yaml_file(tmp_path, f"a: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(UserError, match="not valid YAML in line 1"):
        load_yaml(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "not an override; write key=value"),
        ("=3", "not an override"),
        ("seed=[", "not valid YAML"),
        ("phases=[{sources: 1, sources: 2}]", "the key sources stands twice"),
        ("phases.1.passes=3", "1 is not a position in a list of 1"),
        ("phases.first.passes=3", "first is not a position"),
        ("phases.7=3", "7 is not a position"),
        ("output.name=3", "name cannot be set inside a str"),
        ("output.name.more=3", "name cannot be set inside a str"),
    ],
)
def test_bad_overrides_are_named(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(TrainSettings, override(TRAIN, [assignment]), "here")
    assert assignment in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["clip=.inf"], "clip: input should be a finite number"),
        (["weight_decay=.nan"], "weight_decay: input should be a finite number"),
        (["modle.kind=lstm"], "unknown key modle; did you mean model?"),
        (["model.laiers=2"], "unknown key model.laiers; did you mean layers?"),
        (["phases.0.sources.0.audoi=x"], "unknown key phases.0.sources.0.audoi; did you mean audio?"),
        (["phases.0.sources.0.augment.tme_masks=1"], "augment.tme_masks; did you mean time_masks?"),
        (["audio=x"], "unknown key audio; did you mean phases.sources.audio?"),
        (
            ["audio=x", "learnin_rate=3", "sede=1"],
            "unknown keys audio (did you mean phases.sources.audio?), learnin_rate (did you mean phases.learning_rate?) and sede (did you mean seed?)",
        ),
        (["seed_=1", "qqqqq=1"], "unknown keys seed_ (did you mean seed?) and qqqqq; known keys: average, "),
        (["features.qqqqq=1"], "unknown key features.qqqqq; known keys: hop_ms, kind, mean_frames"),
        (["seed=one"], "seed: input should be a valid integer (given: 'one')"),
        (["seed=1.0"], "seed: input should be a valid integer (given: 1.0)"),
        (["seed=true"], "seed: input should be a valid integer (given: True)"),
        (["seed=-1"], "seed: input should be greater than or equal to 0 (given: -1)"),
        (["tensorboard=1"], "tensorboard: input should be a valid boolean (given: 1)"),
        (["model.kind=gru"], "model.kind: input should be 'lstm', 'separable'"),
        (["phases=[]"], "phases: list should have at least 1 item"),
        (["phases.0.sources.0.ctc=0"], "phases.0.sources.0: set ctc or soft (or both) above 0"),
        (["model=3"], "model: "),
    ],
)  # fmt: skip
def test_wrong_settings_are_named_by_their_path(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(TrainSettings, override(TRAIN, changes), "a.yaml")
    assert str(caught.value).startswith("a.yaml: ") and message in str(caught.value)


@pytest.mark.parametrize(("hop_ms", "frames"), [(10, 6), (20, 3), (8, 8)])
def test_a_delay_in_milliseconds_is_as_many_frames_as_it_takes(hop_ms: int, frames: int) -> None:
    settings = build(TrainSettings, override(TRAIN, ["model.delay_ms=180", f"features.hop_ms={hop_ms}"]), "here")
    assert settings.model.delay_frames == frames and settings.model.delay_ms is None  # as it goes into checkpoints


def test_a_missing_key_is_named_with_what_it_is_for() -> None:
    with pytest.raises(UserError, match=r"x: the key output is missing; set it \(folder of the units\)"):
        build(UnitsSettings, {"source": "a"}, "x")
    with pytest.raises(
        UserError, match=r"x: the keys units and development are missing; set them \(see `asr-kd train --help`\)$"
    ):
        build(TrainSettings, {name: TRAIN[name] for name in ("output", "phases")}, "x")
    with pytest.raises(UserError, match=r"the key phases\.0\.sources is missing"):
        build(TrainSettings, {**TRAIN, "phases": [{"passes": 1}]}, "x")


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing() -> None:
    with pytest.raises(UserError, match="unknown key outptu; did you mean output"):
        build(UnitsSettings, {"source": "a", "outptu": "b"}, "x")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelSettings, {"kind": "blstm", "delay_frames": 2}, "delay_frames belongs to kind lstm"),
        (ModelSettings, {"kind": "blstm", "delay_ms": 20}, "delay_frames belongs to kind lstm"),
        (ModelSettings, {"delay_frames": 6, "delay_ms": 180}, "delay_frames and delay_ms say the same; give one"),
        (AugmentSettings, {"time_frames": 4, "time_ms": 120}, "time_frames and time_ms say the same; give one"),
        (
            TrainSettings,
            {**TRAIN, "model": {"delay_ms": 3000}},
            "delay_ms 3000 is more than 32 frames of 30 ms; lower it",
        ),
        (ModelSettings, {"kind": "conv", "kernel": 4}, "kernel must be odd"),
        (ModelSettings, {"kind": "conformer", "size": 30, "heads": 4}, "multiple of heads"),
        (SourceSettings, {"audio": "a", "soft": 1.0}, "soft learns what somebody answers"),
        (SourceSettings, {"audio": "a", "ctc": 1.0, "targets": "t"}, "nothing is learned from targets"),
        (SourceSettings, {"audio": "a", "soft": 1.0, "targets": []}, "soft learns what somebody answers"),
        (SourceSettings, {"audio": "a", "ctc": 1.0, "resample": True}, "resample needs targets"),
        (SourceSettings, {"audio": "a", "soft": 1.0, "targets": ["t", "s", "t"]}, "targets names t twice"),
        (
            SourceSettings,
            {"audio": "a", "soft": 1.0, "targets": "t", "combine": {"mode": "log_mean"}},
            "combine needs a list of two or more",
        ),
        (
            SourceSettings,
            {"audio": "a", "soft": 1.0, "targets": ["t", "s"], "combine": {"weights": [1]}},
            "1 weights for 2 targets",
        ),
        (
            SourceSettings,
            {"audio": "a", "soft": 1.0, "targets": ["t", "s"], "combine": {"weights": [1, 0]}},
            "combine.weights.1: input should be greater than 0",
        ),
        (
            SourceSettings,
            {"audio": "a", "soft": 1.0, "targets": ["t", "s"], "combine": {"mode": "vote"}},
            "combine.mode: input should be 'mean', 'log_mean', 'confidence' or 'surest'",
        ),
        (
            SourceSettings,
            {"audio": "a", "soft": 1.0, "targets": ["t", "s"], "combine": {"wieghts": [1]}},
            "did you mean weights?",
        ),
        (
            SourceSettings,
            {"audio": "a", "soft": 1.0, "targets": 3},
            r"targets: input should be a valid string \(given: 3\)",
        ),
        (
            SourceSettings,
            {"audio": "a", "ctc": 1.0, "ctc_within_targets": True},
            "ctc_within_targets learns what somebody answers",
        ),
        (SourceSettings, {"audio": "a", "targets": "t", "soft": 1.0, "ctc_within_targets": True}, "needs a ctc weight"),
        (SourceSettings, {"audio": "a", "targets": "t", "soft": 1.0, "mwer": {}}, "mwer needs a ctc weight above 0"),
        (SourceSettings, {"audio": "a", "ctc": 1.0, "mwer": {"hypotheses": 1}}, "mwer.hypotheses: .* equal to 2"),
        (TranscribeSettings, {"checkpoint": "c", "audio": "a"}, "go together"),
        (TranscribeSettings, {"checkpoint": "c", "raw_rate": 8000}, "raw_rate is of raw sound on standard input"),
        (TranscribeSettings, {"checkpoint": "c", "threads": 10**5}, "threads: input should be less than"),
        (TranscribeSettings, {"checkpoint": "c", "piece_ms": 10**30}, "piece_ms: input should be less than"),
        (EvalSettings, {"systems": {"a": "b"}, "output": "o", "audio": {}}, "audio: give a folder of audio shards"),
        (EvalSettings, {"systems": {"a": "b"}, "output": "o", "audio": []}, "audio: give a folder of audio shards"),
        (EvalSettings, {"systems": {"a": "b"}, "output": "o", "audio": {"a/b": "c"}}, "audio: 'a/b' cannot name a set"),
        (LabelSettings, {"teacher": "t", "audio": "a", "output": "o", "temperature": 0.0}, "temperature"),
        (LabelSettings, {"teacher": "t", "audio": "a", "output": "o", "mass": 1.5}, "mass"),
        (
            PipelineSettings,
            {"stages": {"a": {"verb": "unit"}}},
            r"stages\.a\.verb: input should be 'script', 'prepare'",
        ),
        (PipelineSettings, {"stages": {"a": {"verb": "units", "setings": {}}}}, "did you mean settings"),
    ],
)
def test_settings_that_contradict_each_other(kind: type[Settings], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(kind, values, "x")


def test_a_contradiction_names_the_job_not_a_class() -> None:
    with pytest.raises(UserError, match=r"^command line: inspect: png and audio need a key$"):
        build(VERBS["inspect"].kind(), {"targets": "t", "png": "p"}, "command line")


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FeatureSettings().mels = 3  # type: ignore[misc]


def test_frame_of_the_default_features() -> None:
    assert (FeatureSettings().frame_ms, FeatureSettings().dimension) == (30, 192)
