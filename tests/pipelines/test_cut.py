"""The recipe of students cut from their teacher: its pipeline is sound, and its table says what the reports say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from asr_kd.config.load import build
from asr_kd.pipeline import load_pipeline
from asr_kd.training.settings import TrainSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "pipelines" / "taxonomy"))
        spec = importlib.util.spec_from_file_location("cut_measure", ROOT / "pipelines" / "cut" / "measure.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_the_pipeline_is_sound_and_its_students_differ_in_start_and_losses_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stages = script.stages(1, {"passes": 2}) | script.report(1)
    pipeline = {"variables": {"run": str(tmp_path), "jobs": 2}, "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    _, loaded = load_pipeline(tmp_path / "pipeline.yaml", [])
    needs = {stage.name: set(stage.needs) for stage in loaded}
    assert {"strong-1-alignment-labelled", "strong-1-alignment-unlabelled"} <= needs["strong-1-teacher-deep"]
    assert {"strong-1-teacher-deep", "strong-1-pseudo-labels-deep"} <= needs["strong-1-student-deep-triple-copied"]
    assert "strong-1-student-supervised" not in needs["strong-1-student-deep-soft-fresh"]
    assert {f"strong-1-{name}" for name in script.students()} < needs["strong-1-report-cut"]
    for name in script.students():
        settings = build(TrainSettings, stages[f"strong-1-{name}"]["settings"], name)
        taught, labelled = settings.phases[0].sources
        assert settings.init_layers == ([1, 4] if name.endswith("copied") else None)
        assert (settings.init is None) == name.endswith("fresh")
        assert (bool(taught.features), taught.ctc) == ((True, 1.0) if "triple" in name else (False, 0.0))
        assert taught.soft == labelled.ctc == 1.0 and settings.phases[0].passes == 2
        assert taught.teacher == "${run}/strong/seed1/teacher-deep" and not taught.targets
    deep = stages["strong-1-teacher-deep"]["settings"]["model"]
    model = stages["strong-1-student-deep-soft"]["settings"]["model"]
    assert deep == {**model, "layers": 2 * model["layers"]}
    build(TrainSettings, stages["strong-1-teacher-deep"]["settings"], "teacher-deep")


def test_the_table_is_that_of_the_reports(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wers = dict.fromkeys((script.SUPERVISED, *script.students()), (0.2, 0.2))
    wers |= {script.TEACHER: (0.1, 0.1), "student-deep-soft-copied": (0.18, 0.20), "student-deep-soft": (0.19, 0.21)}
    for seed in range(2):
        run = tmp_path / "strong" / f"seed{seed}"
        systems = {
            name: {
                "wer": both[seed], "parameters": 200 if name == script.TEACHER else 120,
                "real_time_factor": 0.002 if name == script.TEACHER else 0.001,
            }
            for name, both in wers.items()
        }  # fmt: skip
        (run / script.REPORT).mkdir(parents=True)
        (run / script.REPORT / "report.json").write_text(json.dumps({"systems": systems}))
        for name in script.students():
            (run / name).mkdir()
            rows = [{"step": step, "development_wer": wer} for step, wer in ((0, 0.01), (50, 0.06), (100, 0.05 + seed))]
            (run / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script.print_table(tmp_path, range(2), {})
    printed = capsys.readouterr().out
    assert "| teacher-deep | 200 (100 %) | 10.00 | 10.00 / 10.00 | – | – | – | 100.0 | – | 0.00200 | 1.00 |" in printed
    assert "| deep-soft-copied | 120 (60 %) | 19.00 | 18.00 / 20.00 | deep-soft | -1.00 ± 0.00 |" in printed
    assert "| 90.0 | 100 / never | 0.00100 | 2.00 |" in printed
