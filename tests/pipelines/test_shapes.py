"""The comparison of families: shapes of one size, paired trainings, the rate that development chooses, and the tables."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from asr_kd.audio.settings import FeatureSettings
from asr_kd.models.acoustic import build_model, parameters, save_checkpoint
from asr_kd.models.settings import STREAMING, ModelSettings
from asr_kd.pipeline import load_pipeline
from asr_kd.units import Units
from tests.training.conftest import letters, units

__all__ = ["letters", "units"]
ROOT = Path(__file__).parents[2]
FEATURES = FeatureSettings(sample_rate=8000)


@pytest.fixture(scope="module")
def measure() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(ROOT)
        spec = importlib.util.spec_from_file_location("shapes_measure", ROOT / "pipelines" / "shapes" / "measure.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "shapes_measure", module)
        spec.loader.exec_module(module)
        yield module


def comparison(measure: ModuleType, root: Path, **changes: Any) -> Any:
    values = {"shapes": measure.read_shapes(), "rates": (0.001, 0.003), "seeds": range(2), "variables": {}} | changes
    return measure.Comparison(root=root, **values)


def test_shapes_are_of_one_size_and_stream(measure: ModuleType) -> None:
    shapes = measure.read_shapes()
    assert {model.kind for model in shapes.values()} == set(STREAMING)
    for model in shapes.values():
        network = build_model(model, FEATURES.dimension, 28)
        assert network.streams and abs(parameters(network) / 190_000 - 1) < 0.02


def test_trainings_differ_in_the_network_and_the_rate_alone(measure: ModuleType, tmp_path: Path) -> None:
    asked = comparison(measure, tmp_path)
    stages = {**asked.stages(0), **asked.stages(1)}
    (tmp_path / "pipeline.yaml").write_text(
        yaml.safe_dump({"variables": {"run": str(tmp_path)}, "stages": stages}, sort_keys=False)
    )
    _, loaded = load_pipeline(tmp_path / "pipeline.yaml", [])
    assert len({stage.output for stage in loaded}) == len({stage.fingerprint for stage in loaded}) == len(stages)
    students = {
        name: one["settings"] for name, one in stages.items() if "-shape-" in name and not name.endswith("-start")
    }
    assert len(students) == 2 * 2 * len(asked.shapes)
    needs = {stage.name: stage.needs for stage in loaded}
    for name, settings in students.items():
        seed = name.split("-")[1]
        assert f"strong-{seed}-soft-targets" in needs[name] and f"strong-{seed}-student-supervised" not in needs[name]
        start = stages[f"{name}-start"]["settings"]
        assert settings["seed"] == start["seed"] == int(seed) and settings.pop("init") == start["output"]
        assert settings["model"] == start["model"] and len(start["phases"][0]["sources"]) == 1
        assert settings["phases"][0].pop("learning_rate") == start["phases"][0]["learning_rate"]
    common = [
        {key: value for key, value in settings.items() if key not in ("output", "model")}
        for name, settings in students.items()
        if name.startswith("strong-0-")
    ]
    assert all(one == common[0] for one in common)


def told(root: Path, seed: int, name: str, wer: float, model: ModelSettings, units: Units) -> None:
    folder = root / "strong" / f"seed{seed}" / name / "best"
    network = build_model(model, FEATURES.dimension, units.size)
    training = {"development_wer": wer, "development_loss": 1.0}
    save_checkpoint(folder, network, units, FEATURES, model, training)


def test_development_chooses_the_rate_and_the_tables_say_what_was_measured(
    measure: ModuleType,
    tmp_path: Path,
    units: Units,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shapes = {
        "lstm": ModelSettings(layers=1, size=8, delay_frames=2),
        "chunked": ModelSettings(kind="chunked_conformer", layers=1, size=8, heads=2, chunk_frames=5),
    }
    asked = comparison(measure, tmp_path, shapes=shapes)
    for seed in (0, 1):
        for shape, wers in {"lstm": (0.05, 0.04), "chunked": (0.03, 0.06 - 0.02 * seed)}.items():
            for rate, wer in zip(asked.rates, wers, strict=True):
                told(tmp_path, seed, measure.student(shape, rate), wer, shapes[shape], units)
        systems = {
            name: {
                "wer": wer + 0.01 * seed,
                "parameters": 1000,
                "units": units.size,
                "lookahead_ms": ahead,
                "real_time_factor": 0.001,
            }
            for name, wer, ahead in (("teacher", 0.02, None), ("lstm", 0.03, 75), ("chunked", 0.05 + 0.001 * seed, 135))
        }
        report = tmp_path / "strong" / f"seed{seed}" / "shapes"
        report.mkdir()
        (report / "report.json").write_text(json.dumps({"systems": systems}))
    assert (asked.rate("lstm"), asked.rate("chunked")) == (0.003, 0.001)
    systems = asked.stages(1, report=True)["strong-1-shapes"]["settings"]["systems"]
    assert systems["lstm"].endswith("seed1/shape-lstm-0.003") and systems["chunked"].endswith(
        "seed1/shape-chunked-0.001"
    )
    monkeypatch.setattr(sys.modules["streaming"], "STREAMED", 200)
    monkeypatch.setattr(measure, "step_speed", lambda *_: 1e5)
    measure.print_tables(asked)
    text = capsys.readouterr().out
    assert "| chunked | 0.001: 3.00, 0.003: 5.00 | 0.001 |" in text
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in text.splitlines() if "1,000" in row}
    assert rows["chunked"][2:6] == ["5.55", "5.00 / 6.10", "+2.05 ± 0.64", "worse by 40 to 77 %"]
    assert (
        rows["chunked"][6] == "135 / 75" and rows["lstm"][6] == "75 / 75"
    )  # of 5 frames the first waits for 4, the last for none
    assert rows["lstm"][4] == "–" and rows["teacher"][6] == "all / all" and rows["lstm"][8].startswith("3,000")


def test_a_shape_that_is_not_there_is_named(
    measure: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure.py", "--shapes", "lsmt"])
    with pytest.raises(SystemExit):
        measure.main()
    assert "--shapes: lsmt is not in shapes.yaml; it has lstm, separable" in capsys.readouterr().err
