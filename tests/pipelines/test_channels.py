"""The recipe of parallel channels: its pipeline, and the telephone whose start `asr-kd pair` finds."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from asr_kd.pipeline import load_pipeline
from asr_kd.selection.pair import pair
from asr_kd.selection.settings import PairSettings
from asr_kd.shards.tarset import Sample, read_index
from tests.audio.test_offset import speech
from tests.training.conftest import write_audio

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def telephone() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "pipelines" / "channels"))
        yield importlib.import_module("telephone")


def test_the_pipeline_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, stages = load_pipeline(ROOT / "pipelines" / "channels" / "pipeline.yaml", [])
    needs = {stage.name: set(stage.needs) for stage in stages}
    assert needs["pairs"] == {"data", "phone-unlabelled"}
    assert needs["student-paired"] - needs["student-telephone"] == {"pairs", "soft-targets"}
    assert "phone-unlabelled" not in needs["soft-targets"] | needs["teacher"]


def test_pairs_find_when_a_telephone_starts(
    telephone: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for number in range(4):
        data = io.BytesIO()
        soundfile.write(data, 0.3 * speech(number), 8000, format="WAV")
        said.append(Sample(f"u{number}", data.getvalue(), "wav", {"seconds": 3.0, "speaker": "s"}))
    audio, phone = write_audio(tmp_path / "clean", [said[:3], said[3:]]), tmp_path / "phone"
    monkeypatch.setattr("sys.argv", ["telephone.py", "--audio", audio, "--output", str(phone)])
    telephone.main()
    written = {path.name: path.read_bytes() for path in phone.iterdir()}
    telephone.main()
    assert {path.name: path.read_bytes() for path in phone.iterdir()} == written
    assert read_index(phone).samples == 4
    pair(PairSettings(heard=audio, audio=str(phone), output=str(tmp_path / "pairs.jsonl")))
    for line in map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines()):
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(line["key"].encode()).digest()[:8]))
        assert line["kept"] and line["offset_ms"] == pytest.approx(1000 * rng.uniform(*telephone.LATER), abs=1.0)
