from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd.errors import UserError
from asr_kd.shards.manifests import open_manifest, parquet
from tests.shards.manifests.laid_out import encoded, listed, prepared, quarantined, sound, write

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def table(path: Path, group: int = 4, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def embedded(*seeds: int, path: str | None = "{}.flac") -> list[dict[str, Any]]:
    return [{"bytes": encoded(seed), "path": path and path.format(seed)} for seed in seeds]


def test_embedded_audio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    table(
        folder / "train-00000-of-00002.parquet", audio=embedded(0, 1, 2), transcription=["one", None, "three"], speaker_id=[7, 8, 9],
        snr=[1.5, float("nan"), None], when=[datetime.date(2024, 1, 2)] * 3, tags=[["a"], [], ["b", "c"]], raw=[b"x"] * 3, begin_time=[0.5, 1.5, 2.5],
    )  # fmt: skip
    table(
        folder / "train-00001-of-00002.parquet",
        audio=[*embedded(0), {"bytes": None, "path": "gone.flac"}, *embedded(4, path=None)],
    )
    found = prepared(folder, tmp_path / "shards", max_bad_share=0.2)
    assert "data: read as Parquet with embedded audio, 6 utterances, 4 without text\n" in capsys.readouterr().err
    assert list(found) == ["0", "1", "2", "0-2", "train-00001-of-00002-0-2"]
    for (heard, _), seed in zip(found.values(), (0, 1, 2, 0, 4), strict=True):
        np.testing.assert_array_equal(heard, sound(seed))
    assert found["0"][1] == {"text": "one", "speaker_id": 7, "snr": 1.5, "when": "2024-01-02", "tags": ["a"], "begin_time": 0.5, "seconds": 0.5}  # fmt: skip
    assert found["1"][1]["snr"] is None and "text" not in found["1"][1]
    assert "holds no audio, only a path or nothing" in quarantined(tmp_path / "shards")["gone"]


def test_ids_are_the_keys(tmp_path: Path) -> None:
    path = table(tmp_path / "x", audio=embedded(0, 1), id=["19/198.1", "19-198-2"], text=["a", "b"])
    assert [(one.key, one.fields["id"]) for one in listed(path)] == [("19-198_1", "19/198.1"), ("19-198-2", "19-198-2")]
    bare = table(tmp_path / "y", bytes=[encoded(3)], key=[12])
    assert [(one.key, one.audio.read_bytes()) for one in listed(bare)] == [("12", encoded(3))]


@pytest.mark.parametrize("group", [1, 7, 100])
def test_cells_are_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(parquet, "AUDIO_ROWS", 3)
    monkeypatch.setattr(parquet, "ROWS", 5)
    sounds = [bytes([seed]) * (seed + 1) for seed in range(20)]
    path = table(
        tmp_path / f"x{group}",
        group,
        audio=[{"bytes": one, "path": None} for one in sounds],
        text=[*map(str, range(20))],
    )
    found = listed(path)
    assert [one.text for one in found] == [*map(str, range(20))]
    for index in [*range(20), *np.random.default_rng(0).permutation(20)]:
        assert found[index].audio.read_bytes() == sounds[index]
    assert len({one.key for one in found}) == 20 and found[3].audio.read_bytes(1, 2) == sounds[3][2:3]


def test_what_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, message in [
        ({"text": ["a"], "file": ["a.flac"]}, r"x: has no column with the bytes of audio files, only text, file"),
        ({"near": embedded(0), "far": embedded(1)}, r"x: holds audio in several columns \(near\.bytes, far\.bytes\)"),
        ({"audio": embedded(0), "text": [5]}, r"x, group 0, row 0: `text` must be text, not 5"),
        ({"audio": embedded(0)[:0]}, r"x: "),
    ]:
        with pytest.raises(UserError, match=message):
            open_manifest(table(tmp_path / "x", **columns)).survey()  # type: ignore[arg-type]
    path = table(tmp_path / "x", audio=embedded(0))
    write(path, path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"x: cannot be read as Parquet \(.*\); fetch the file again"):
        listed(path)
    for split in ("train", "test"):
        table(tmp_path / "two" / f"{split}-00000-of-00001.parquet", audio=embedded(0))
    with pytest.raises(UserError, match=r"two: holds several splits \(test, train\); put the files of one"):
        listed(tmp_path / "two")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"Parquet needs the extra asr-kd\[parquet\]; pip install"):
        listed(tmp_path / "two" / "train-00000-of-00001.parquet")


def test_times_of_nanoseconds_are_rounded(tmp_path: Path) -> None:
    times = [1_704_164_645_123_456_789]
    kinds = {"at": pa.timestamp("ns"), "there": pa.timestamp("ns", "UTC"), "took": pa.duration("ns")}
    columns = {name: pa.array(times, type=kind) for name, kind in kinds.items()}
    (found,) = listed(
        table(tmp_path / "x", audio=embedded(0), hour=pa.array([61_000_000_789], type=pa.time64("ns")), **columns)
    )  # type: ignore[arg-type]
    assert found.fields == {
        "at": "2024-01-02T03:04:05.123456", "there": "2024-01-02T03:04:05.123456+00:00", "took": "19724 days, 3:04:05.123456", "hour": "00:01:01",
    }  # fmt: skip


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    arrays = [pa.array(embedded(0)), pa.array(["one"]), pa.array(["two"])]
    pq.write_table(pa.Table.from_arrays(arrays, names=["audio", "text", "text"]), tmp_path / "x")
    with pytest.raises(UserError, match=r"x: the column 'text' stands twice; rename or remove one of them"):
        listed(tmp_path / "x")


def test_damage_that_a_checksum_shows_is_noticed(tmp_path: Path) -> None:
    """And a file that is another one since it was read is read again."""
    path = tmp_path / "x"
    pq.write_table(pa.table({"audio": embedded(0, 1)}), path, write_page_checksum=True, compression="none")
    (first, _) = listed(path)
    assert first.audio.read_bytes() == encoded(0)
    whole = path.read_bytes()
    at = whole.index(encoded(0)) + 2000
    write(path, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match=r"x: cannot be read as Parquet \(.*CRC.*\); fetch the file again"):
        first.audio.read_bytes()
