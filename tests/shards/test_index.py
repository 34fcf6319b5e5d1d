from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.shards import index
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.tarset import read_index, write_index

INFOS = [
    ShardInfo(f"{'long-' * (number % 3)}{number}.tar", number, number / 7, 1 << number, hashlib.sha256(b"%d" % number).hexdigest())
    for number in range(62)
]  # fmt: skip
LAYOUTS: dict[str, Callable[[object], str]] = {
    "lines": lambda value: json.dumps(value).replace("}, {", "},\n{"),
    "one line": json.dumps,
    "compact": lambda value: json.dumps(value, separators=(",", ":")),
    "indented": lambda value: json.dumps(value, indent=2),
    "another order": lambda value: json.dumps(value, sort_keys=True),
}


@pytest.fixture
def shards(tmp_path: Path) -> ShardList:
    write_index(tmp_path, INFOS)
    return read_index(tmp_path)


def test_shards_are_a_sequence(shards: ShardList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "BLOCK", 10)
    assert list(shards) == INFOS and shards == INFOS and len(shards) == len(INFOS)
    assert shards[3] == INFOS[3] and shards[-1] == INFOS[-1] and INFOS[5] in shards
    assert shards[7:50:3] == INFOS[7:50:3] and shards[:0] == []
    assert shards[40:] + shards[:40] == INFOS[40:] + INFOS[:40]
    assert shards.take(np.array([4, 2, 4])) == [INFOS[4], INFOS[2], INFOS[4]]
    assert shards.take(np.arange(len(INFOS)) < 3) == INFOS[:3]
    assert list(shards.names) == [info.name for info in INFOS]
    with pytest.raises(IndexError):
        shards[len(INFOS)]


def test_sums_and_hash(shards: ShardList) -> None:
    assert shards.samples == sum(info.samples for info in INFOS)
    assert shards.seconds == pytest.approx(sum(info.seconds for info in INFOS))
    text = "".join(f"{info.name} {info.sha256}\n" for info in INFOS)
    assert shards.hash == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert shards[1:].hash != shards.hash
    assert shards[:0].samples == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("piece", [100, 700, 1 << 18])
def test_any_layout_is_read(layout: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "PIECE", piece)
    value = {"format": "asr_kd-shards", "version": 1, "shards": [dataclasses.asdict(info) for info in INFOS]}
    (tmp_path / "index.json").write_text(LAYOUTS[layout](value))
    assert read_index(tmp_path) == INFOS
    value["shards"] = []
    (tmp_path / "index.json").write_text(LAYOUTS[layout](value))
    assert read_index(tmp_path) == []


def test_what_is_written_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "PIECE", 700)
    write_index(tmp_path, INFOS)
    with open(tmp_path / "index.json", "rb") as file:
        assert index.read_pieces(file) == INFOS


def test_a_name_that_is_there_twice_is_found_in_any_order(tmp_path: Path) -> None:
    for infos in (INFOS[:3] + INFOS[2:5], INFOS[::-1] + INFOS[:1]):
        write_index(tmp_path, infos)
        with pytest.raises(UserError, match="lists a shard twice"):
            read_index(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_what_is_read_is_what_the_json_says(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PIECE", data.draw(st.sampled_from([200, 700, 1 << 18])))
    write_index(tmp_path, INFOS[:8])
    text = bytearray((tmp_path / "index.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.sampled_from([start, start + 1, start + 3, len(text)]))
        text[start:end] = data.draw(
            st.sampled_from([b"", b"},", b"{", b"}", b"]}", b",", b'"', b"0", b" ", b"\xff", b"null"])
        )
    (tmp_path / "index.json").write_bytes(text)
    try:
        shards = read_index(tmp_path)
    except UserError as error:
        assert str(error).startswith(f"{tmp_path}/index.json: ")
        return
    assert [dataclasses.asdict(info) for info in shards] == [
        {field: entry[field] for field in ("name", "samples", "seconds", "bytes", "sha256")}
        for entry in json.loads(text)["shards"]
    ]
