"""The recipe of quantised students: its pipeline is sound, and its table says what the reports say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from asr_kd.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "pipelines" / "taxonomy"))
        spec = importlib.util.spec_from_file_location(
            "quantised_measure", ROOT / "pipelines" / "quantised" / "measure.py"
        )
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_the_pipeline_is_sound_and_shares_what_the_comparison_trains(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stages = script.stages(1, script.BITS, {"passes": 2})
    pipeline = {"variables": {"run": str(tmp_path), "jobs": 2}, "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    _, loaded = load_pipeline(tmp_path / "pipeline.yaml", [])
    needs = {stage.name: set(stage.needs) for stage in loaded}
    assert {"strong-1-student-soft", "strong-data"} <= needs["strong-1-student-soft-4-bits"]
    assert "strong-1-pseudo-labels" in needs["strong-1-student-bits-2-pseudo"]
    assert "strong-1-soft-targets" in needs["strong-1-student-bits-2"]
    rows = {folder for folder, _ in script.rows_of(script.BITS).values()}
    assert {f"strong-1-{folder}" for folder in rows} < needs["strong-1-report-quantised"]
    taxonomy = script.stages_of("strong", 1, [(script.read_arms()["soft"], None)], {"passes": 2})
    assert all(stages[name] == stage for name, stage in taxonomy.items())
    for name in ("soft", "bits-4"):
        settings = dict(stages[f"strong-1-student-{name}"]["settings"])
        assert settings.pop("output").endswith(name)
        assert settings.pop("model").get("bits") == (4 if name == "bits-4" else None)
        assert settings == {key: stages["strong-1-student-soft"]["settings"][key] for key in settings}


def test_the_table_is_that_of_the_reports(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wers = {"student-soft": (0.10, 0.12), "student-pseudo": (0.2, 0.2), "student-soft-2-bits": (0.5, 0.7)}
    wers |= {"student-bits-2-pseudo": (0.3, 0.3), "student-bits-2": (0.11, 0.13)}
    for seed in range(2):
        folder = tmp_path / "strong" / f"seed{seed}" / "report-quantised"
        folder.mkdir(parents=True)
        systems = {
            name: {"wer": both[seed], "size_bytes": 5000 if "2" in name else 40_000} for name, both in wers.items()
        }
        (folder / "report.json").write_text(json.dumps({"systems": systems}))
    script.print_table(tmp_path, range(2), [2])
    printed = capsys.readouterr().out
    assert "| float32, soft targets | 40 | 100 % | 11.00 | 10.00 / 12.00 | – | – |" in printed
    assert "| 2 bits, after training | 5 | 12 % | 60.00 | 50.00 / 70.00 | +49.00 ± 114.35 |" in printed
    assert "| 2 bits, in training on pseudo-labels | 5 | 12 % | 30.00 | 30.00 / 30.00 | +10.00 ± 0.00 |" in printed
    assert (
        "| 2 bits, in training on soft targets | 5 | 12 % | 12.00 | 11.00 / 13.00 | +1.00 ± 0.00 | worse by 9 to 9 % |"
        in printed
    )
