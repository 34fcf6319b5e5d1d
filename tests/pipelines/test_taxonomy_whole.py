"""The comparison of methods as a whole, on tones in place of speech: trained, tuned, evaluated, measured and printed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from asr_kd import cli
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.tarset import read_index, read_shard
from tests.pipelines.test_taxonomy import script
from tests.training.conftest import FEATURES, audio, development

__all__ = ["audio", "development", "script"]
ROOT = Path(__file__).parents[2]


def tiny(root: Path, audio: str, development: str) -> None:
    """The task strong on tones in place of digits, with small networks and few passes; data and task files in `root`."""
    task = yaml.safe_load((ROOT / "pipelines" / "taxonomy" / "strong.yaml").read_text())
    task["variables"] |= {"passes": 2, "reach": 0.9}
    del task["stages"]["data"]
    for stage in task["stages"].values():
        if stage["verb"] == "units":
            stage["settings"] |= {"kind": "char", "size": 10}
        if stage["verb"] == "train":
            settings = stage["settings"]
            model = {"kind": settings["model"]["kind"], "layers": 2, "size": 12}
            settings |= {"features": FEATURES.model_dump(), "model": model, "batch_frames": 100, "evaluate_every": 4}
            for phase in settings["phases"]:
                phase["passes"] = phase["passes"] if isinstance(phase["passes"], str) else 12
                for source in phase["sources"]:
                    source["augment"] = {}
    (root / "strong.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    data = root / "runs" / "strong" / "data"
    for name in ("labelled", "unlabelled", "unlabelled-quarter"):
        shutil.copytree(audio, data / name)
    for name in ("development", "test"):
        shutil.copytree(development, data / name)
    samples = [sample for info in read_index(Path(audio)) for sample in read_shard(Path(audio) / info.name)]
    write_transcripts(data / "unlabelled-oracle.jsonl", [(sample.key, sample.fields["text"]) for sample in samples])


def in_this_process(root: Path, stages: dict[str, Any], jobs: int) -> set[str]:
    """Runs stages as a pipeline does, without a process for each."""
    for stage in stages.values():
        settings = filled_in(stage["settings"], str(root))
        (root / "settings.yaml").write_text(yaml.safe_dump(settings))
        done = cli.main([stage["verb"], str(root / "settings.yaml")]) if not Path(settings["output"]).exists() else 0
        assert not done, settings["output"]
    return set()


def filled_in(settings: dict[str, Any], run: str) -> Any:
    return yaml.safe_load(yaml.safe_dump(settings).replace("${run}", run))


def test_from_data_to_tables(
    script: SimpleNamespace,
    audio: str,
    development: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny(tmp_path, audio, development)
    monkeypatch.setattr(script.arms, "HERE", tmp_path)
    monkeypatch.setattr(script.measure, "run_stages", in_this_process)
    monkeypatch.setattr(script.costs, "peak_memory", lambda settings: 10**8)
    monkeypatch.setattr(script.costs, "STEPS", 2)
    command = ["measure.py", "--tasks", "strong", "--arms", "spikes", "online", "--seeds", "2", "--output", str(tmp_path / "runs")]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    script.measure.main()
    said = capsys.readouterr().out
    tables = said[said.index("\n| strong: arm") :]  # `eval` prints one too
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    names = [row[0].removeprefix("| ") for row in rows]
    assert names == [
        "strong: arm", "spikes",
        "strong: arm", "teacher", "student-supervised", "soft", "spikes", "online",
        "strong: arm", "student-supervised", "soft", "spikes", "online",
    ]  # fmt: skip
    scores, quiet = rows[3:8], rows[9:]
    assert [row[3] for row in scores] == ["–", "–", "–", "soft", "soft"] and all("±" in row[4] for row in scores[3:])
    assert all(row[2].count("/") == 1 for row in scores) and "1.00" in quiet[1][-2] and "100" in quiet[1][-1]
    assert all(len({len(row) for row in table}) == 1 for table in (rows[2:8], rows[8:]))
    script.measure.main()  # nothing is run or measured again
    again = capsys.readouterr().out
    assert again[again.index("\n| strong: arm") :] == tables
    assert "cost of" in said and "cost of" not in again
