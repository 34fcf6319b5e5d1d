from __future__ import annotations

import json
from pathlib import Path

import pytest

from asr_kd.errors import UserError
from asr_kd.shards.records import Outcome, read_record
from asr_kd.shards.settings import PrepareSettings

SHARD = {"name": "shard-000000.tar", "samples": 1, "seconds": 1.0, "bytes": 1024, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "value",
    ["{}", "[]", "3", '{"shard": null}', '{"shard": {"name": "x"}, "quarantined": []}', '{"shard": 3, "quarantined": []}', '{"shard": null, "quarantined": [1]}',
     '{"shard": null, "quarantined": [{"key": "a"}]}', '{"quarantined": []}'],
)  # fmt: skip
def test_what_is_no_record_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "x.json").write_text(value)
    with pytest.raises(UserError, match=r"x\.json: is no record of a shard; remove it, and run the command again"):
        read_record(tmp_path / "x.json")


@pytest.mark.parametrize("value", [{"shard": SHARD, "quarantined": []}, {"shard": None, "quarantined": [{"key": "a", "reason": "b"}]}])  # fmt: skip
def test_a_record_is_read(tmp_path: Path, value: dict[str, object]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_record(tmp_path / "x.json") == value


def test_utterances_that_no_record_tells_of_are_missed(tmp_path: Path) -> None:
    settings = PrepareSettings(manifest="m", output=str(tmp_path), max_bad_share=1.0)
    outcome = Outcome(3)
    outcome.add({"shard": SHARD, "quarantined": [{"key": "a", "reason": "b"}]})
    with pytest.raises(UserError, match="the records are not of all 3 utterances; remove"):
        outcome.tell(settings)
    Outcome(2, written=1, quarantined=1).tell(settings)
