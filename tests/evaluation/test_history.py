from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asr_kd.evaluation.history import learning_curve, unlabelled_hours
from asr_kd.shards.tarset import read_index
from tests.evaluation.conftest import speech, write_shards


def run_with(folder: Path, *sources: dict[str, Any]) -> Path:
    """A run folder that learned from these sources, a set of shards each name."""
    for source in sources:
        if not (folder / source["audio"]).exists():
            write_shards(folder / source["audio"], [[speech(f"u{index}", index) for index in range(3)]])
        source["audio"] = str(folder / source["audio"])
    data = {source["audio"]: read_index(source["audio"]).hash for source in sources}
    settings = {"phases": [{"sources": [source]} for source in sources], "data": data}
    (folder / "run" / "best").mkdir(parents=True)
    (folder / "run" / "job.json").write_text(json.dumps({"job": "train", "settings": settings}))
    return folder / "run"


def test_unlabelled_audio_counts_once(tmp_path: Path) -> None:
    run = run_with(
        tmp_path,
        {"audio": "labelled", "ctc": 1.0, "transcripts": None},
        {"audio": "unlabelled", "ctc": 0.0, "soft": 1.0, "transcripts": None},
        {"audio": "unlabelled", "ctc": 0.0, "soft": 0.5},
        {"audio": "pseudo", "ctc": 1.0, "transcripts": "texts.jsonl"},
    )
    hours = 2 * (0.5 + 0.7 + 0.9) / 3600
    assert unlabelled_hours(run) == pytest.approx(hours)
    assert unlabelled_hours(run / "best") == pytest.approx(hours)


def test_what_a_run_hears_of_no_audio_counts_for_nothing(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"audio": "unlabelled", "soft": 1.0})
    claim = json.loads((run / "job.json").read_text())
    claim["settings"]["phases"].append({"sources": [{"audio": None, "generated": {"kind": "noise"}, "soft": 1.0}]})
    (run / "job.json").write_text(json.dumps(claim))
    assert unlabelled_hours(run) == pytest.approx((0.5 + 0.7 + 0.9) / 3600)


def test_a_teacher_that_is_a_name_has_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path, {"audio": "unlabelled", "soft": 1.0})
    monkeypatch.chdir(run)
    assert unlabelled_hours(Path("torchaudio:WAV2VEC2_ASR_BASE_960H")) is None


def test_labelled_audio_alone(tmp_path: Path) -> None:
    assert unlabelled_hours(run_with(tmp_path, {"audio": "labelled", "ctc": 1.0, "transcripts": None})) == 0


def test_unknown(tmp_path: Path) -> None:
    assert unlabelled_hours(tmp_path / "nowhere") is None
    run = run_with(tmp_path, {"audio": "unlabelled", "soft": 1.0})
    index = tmp_path / "unlabelled" / "index.json"
    text = index.read_text()
    index.unlink()
    assert unlabelled_hours(run) is None
    index.write_text(text.replace(json.loads(text)["shards"][0]["sha256"], "0" * 64))
    assert unlabelled_hours(run) is None
    (run / "job.json").write_text("[]")
    assert unlabelled_hours(run) is None


def test_no_learning_curve(tmp_path: Path) -> None:
    assert learning_curve(tmp_path / "nowhere") == []
