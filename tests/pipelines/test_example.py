from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from asr_kd.shards.tarset import Sample, write_index, write_shard

SCRIPT = Path(__file__).parents[2] / "pipelines" / "own_audio" / "example.py"


def test_manifests_and_audio_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("labelled", "unlabelled", "development", "test"):
        folder = tmp_path / "run" / "data" / part
        folder.mkdir(parents=True)
        text = {} if part == "unlabelled" else {"text": "one"}
        samples = [Sample(f"{part}-{number}", part.encode(), "flac", {"seconds": 1.0, **text}) for number in range(4)]
        infos = [write_shard(folder / f"shard-{number}.tar", samples[2 * number :][:2]) for number in range(2)]
        write_index(folder, infos)
    monkeypatch.setattr(sys, "argv", ["example.py", str(tmp_path / "run"), str(tmp_path / "mine")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    for part in ("labelled", "unlabelled", "development", "test"):
        lines = [json.loads(line) for line in (tmp_path / "mine" / f"{part}.jsonl").read_text().splitlines()]
        assert [line["key"] for line in lines] == [f"{part}-{number}" for number in range(4)]
        assert all(("text" in line) == (part != "unlabelled") for line in lines)
        assert all((tmp_path / "mine" / line["audio"]).read_bytes() == part.encode() for line in lines)
