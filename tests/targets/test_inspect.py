from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asr_kd.errors import UserError
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.texts import train_units
from asr_kd.targets.inspect import draw, inspect
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.settings import InspectSettings
from asr_kd.targets.store import TargetMetadata, write_target_shard
from asr_kd.units import Units

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Units:
    folder = tmp_path_factory.mktemp("units")
    (folder / "text.txt").write_text("ab\nba\n" * 5)
    return train_units(
        UnitsSettings(source=str(folder / "text.txt"), output=str(folder / "units"), kind="char", size=9)
    )


@pytest.fixture
def shard(tmp_path: Path, units: Units) -> Path:
    dense = np.full((4, units.size), 0.1 / (units.size - 1))
    dense[range(4), [0, 1, 2, 0]] = 0.9
    target = SparsePosteriors.from_dense(np.log(dense), 2, 1.0)
    statistics = {
        "utterances": 2, "frames": 8, "audio_seconds": 0.24, "entries_per_frame": 2.0, "bytes_per_frame": 5.0,
        "mean_kept_mass": 0.9, "mean_kl": 0.01, "worst_kl": 0.02, "top1_kept": 1.0,
    }  # fmt: skip
    metadata = TargetMetadata.model_validate(
        {
            "codec": {"version": 2, "levels": 128}, "selection": {"mode": "top_k", "k": 2}, "teacher": "0123456789abcdef",
            "units_hash": units.hash, "num_units": units.size, "frame_ms": 30, "features": {}, "audio_sha256": "0" * 64,
            "quarantined": {"bad": "no sound"}, "statistics": statistics,
        }
    )  # fmt: skip
    (tmp_path / "targets").mkdir()
    write_target_shard(tmp_path / "targets" / "shard-000000.tar", metadata, [("one", target), ("two", target)])
    return tmp_path / "targets" / "shard-000000.tar"


def show(shard: Path, **values: object) -> None:
    inspect(InspectSettings.model_validate({"targets": str(shard), **values}))


def test_a_shard_is_described_and_listed(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(shard.parent)
    text = capsys.readouterr().out
    for part in ("0123456789abcdef", "mode top_k, k 2", "mean_kl            0.01", "bad", "quarantined: no sound"):
        assert part in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("one ", "two "))]
    assert [row[:3] for row in rows] == [["one", "4", "2.00"], ["two", "4", "2.00"]]
    show(shard, rows=1)
    assert "… and 1 more" in capsys.readouterr().out


@pytest.mark.parametrize("keep", ["events", "codes"])
def test_hidden_states_are_described(keep: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(Path(__file__).parent.parent / "golden" / "targets-v4" / f"{keep}.tar")
    text = capsys.readouterr().out
    rows = {"events": "hidden states      events, 2 rows", "codes": "1 codebooks of quantiser f53b5ad50f3bd160"}
    assert rows[keep] in text
    assert f"  layer.1          width 2, {'1e-07' if keep == 'events' else '0.25'} of its variance lost" in text


def test_an_utterance_is_a_table_with_names_of_units(
    shard: Path, units: Units, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "units"
    folder.mkdir()
    (folder / "units.model").write_bytes(units.model)
    show(shard.parent, key="two", units=str(folder), png=str(tmp_path / "two.png"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("two: 4 frames of 30 ms") and lines[3].split()[0] == "0.03"
    assert f"{units.piece(1)} 0.9" in lines[3] and "∅ 0.9" in lines[2]
    assert (tmp_path / "two.png").read_bytes().startswith(PNG)


def test_a_picture_without_matplotlib_is_refused_at_once(
    shard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asr_kd.errors.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"png: matplotlib is not installed; run `pip install 'asr-kd\[report\]'`"):
        show(shard, key="two", png="two.png")
    assert capsys.readouterr().out == ""


def test_the_picture_takes_a_spectrum(shard: Path, tmp_path: Path) -> None:
    target = SparsePosteriors.from_alignment(np.array([0, 1, 1, 2]), 4)
    draw(str(tmp_path / "a.png"), "a", target, 30, str, np.zeros((12, 8)))
    draw(str(tmp_path / "b.png"), "a", target, 30, str, None)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"key": "three"}, "three is not there; leave out key"),
        ({"key": "bad"}, r"bad was quarantined \(no sound\)"),
    ],
)
def test_what_cannot_be_shown_is_named(shard: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        show(shard, **values)
    with pytest.raises(UserError, match="no shard holds three"):
        show(shard.parent, key="three")
    with pytest.raises(UserError, match="no such shard"):
        show(shard.parent / "none.tar")


def test_units_of_others_are_refused(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("xyz\nzyx\n" * 5)
    train_units(UnitsSettings(source=str(tmp_path / "text.txt"), output=str(tmp_path / "other"), kind="char", size=9))
    with pytest.raises(UserError, match="give its own units"):
        show(shard, key="one", units=str(tmp_path / "other"))
