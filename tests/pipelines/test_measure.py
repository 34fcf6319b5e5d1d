from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from asr_kd.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_measure", ROOT / "pipelines" / "digits" / "measure.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
