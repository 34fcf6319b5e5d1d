from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from asr_kd.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("digits_measure", ROOT / "pipelines" / "digits" / "measure.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "pipelines" / "digits"))  # and what the script adds goes again
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def heard(settings: dict[str, Any]) -> Counter[str]:
    """Times that each set of audio is read."""
    times: Counter[str] = Counter()
    for phase in settings["phases"]:
        for source in phase["sources"]:
            times[source["audio"]] += settings.get("cycles", 1) * phase["passes"] * source.get("repeat", 1)
    return times


@pytest.mark.parametrize("name", ["schedules", "averages"])
def test_pipelines_are_sound_and_share_the_recipes_stages(
    at_root: None, script: ModuleType, tmp_path: Path, name: str
) -> None:
    pipeline = getattr(script, f"{name}_pipeline")()
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    _, stages = load_pipeline(tmp_path / "pipeline.yaml", [])
    recipe = {stage.name: stage.fingerprint for stage in load_pipeline(Path("pipelines/digits/pipeline.yaml"), [])[1]}
    shared = [stage for stage in stages if stage.name in recipe]
    assert len(shared) == 7 and all(stage.fingerprint == recipe[stage.name] for stage in shared)
    new = [stage for stage in stages if stage.name not in recipe]
    assert len({stage.fingerprint for stage in new}) == len(new) == len({stage.output for stage in new}) > 7


def test_every_schedule_hears_the_same_audio(at_root: None, script: ModuleType) -> None:
    stages = script.schedules_pipeline()["stages"]
    students = [stage["settings"] for name, stage in stages.items() if name.startswith("student-distilled")]
    recipe, *others = map(heard, students)
    assert len(others) == 7 and recipe == {"${run}/data/${unlabelled}": 14, "${run}/data/labelled": 56}
    assert all(other == recipe for other in others)


def test_with_noise_a_student_hears_the_same_and_noise(at_root: None, script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(script.noise_pipeline(), sort_keys=False))
    _, stages = load_pipeline(tmp_path / "pipeline.yaml", [])
    settings = {stage.name: stage.settings for stage in stages}
    for kind in ("student-pseudo-label", "student-distilled"):
        quiet, noisy = settings[kind], settings[f"{kind}-noise"]
        assert heard(quiet) == heard(noisy)
        for one, other in zip(quiet["phases"][0]["sources"], noisy["phases"][0]["sources"], strict=True):
            assert one["augment"].pop("noise") is None and other["augment"].pop("noise") and one == other
    assert len(settings["report-conditions"]["systems"]) == 6


def test_the_table_by_condition(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, changed in enumerate((0.1, 0.2)):
        wers = {"teacher": 0.3, "student-distilled": 0.4, "student-distilled-noise": changed}
        values = [
            {"value": value, "systems": {name: {"wer": wer} for name, wer in wers.items()}}
            for value in ("babble 0 dB", "babble 10 dB", "clean", "reverberation")
        ]
        (tmp_path / f"{seed}").mkdir()
        report = {"slices": [{"field": "speaker", "values": []}, {"field": "condition", "values": values}]}
        (tmp_path / f"{seed}" / "report.json").write_text(json.dumps(report))
    sys.modules["noisy"].print_conditions([tmp_path / "0", tmp_path / "1"])
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert head.startswith(
        "| WER %, mean of 2 | teacher | student-distilled | student-distilled-noise | student-distilled:"
    )
    assert [row.split(" | ")[0] for row in rows] == ["| clean", "| babble 10 dB", "| babble 0 dB", "| reverberation"]
    # -75 and -50 %: a mean of -62.5, a standard deviation of 17.7, t of one degree of freedom 12.7
    assert rows[0] == "| clean | 30.0 | 40.0 | 15.0 | -62 % (-221 to +96) |"
    sys.modules["noisy"].print_conditions([tmp_path / "0"])
    assert "-75 % (one seed)" in capsys.readouterr().out
