from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from asr_kd.errors import UserError
from asr_kd.selection.pair import pair
from asr_kd.selection.settings import PairSettings
from asr_kd.shards.tarset import Sample, read_index
from tests.audio.test_offset import later, noisy, speech, telephone
from tests.training.conftest import write_audio

Pairing = Callable[..., dict[str, dict[str, Any]]]


def flac(key: str, sound: np.ndarray, rate: int) -> Sample:
    data = io.BytesIO()
    soundfile.write(data, 0.1 * sound / np.abs(sound).max(), rate, format="FLAC")
    return Sample(key, data.getvalue(), "flac", {"seconds": len(sound) / rate})


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Eight utterances close by, at 16 kHz; and over the telephone, later and in other shards: u3 is another, u5 drifts, u6 is not there,
    u7 is cut short, and u9 has no counterpart.
    """
    folder = tmp_path_factory.mktemp("pairs")
    wide = {f"u{number}": speech(number, 20.0 if number == 5 else 2.0, 16000) for number in range(8)}
    close = [flac(key, sound, 16000) for key, sound in wide.items()]
    said = {key: soxr.resample(sound, 16000, 8000) for key, sound in wide.items() if key != "u6"} | {"u9": speech(9)}
    said["u3"] = speech(33, 2.0)
    said["u5"] = np.interp(np.arange(160000) * (1 - 1e-3), np.arange(160000), said["u5"])
    said["u7"] = said["u7"][:8000]
    heard = {key: later(noisy(-telephone(sound), 15), 37.0 if key != "u1" else -60.0) for key, sound in said.items()}
    distant = [flac(key, sound, 8000) for key, sound in reversed(heard.items())]
    return write_audio(folder / "close", [close[:3], close[3:]]), write_audio(
        folder / "far", [distant[:1], distant[1:]]
    )


@pytest.fixture
def paired(sets: tuple[str, str], tmp_path: Path) -> Pairing:
    def run(**changes: Any) -> dict[str, dict[str, Any]]:
        values = {"heard": sets[0], "audio": sets[1], "output": str(tmp_path / "pairs.jsonl"), "most_ms": 500.0}
        pair(PairSettings.model_validate(values | changes))
        lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
        return {line["key"]: line for line in lines}

    return run


def test_pairs_are_found_with_their_offsets_and_others_refused(
    paired: Pairing, sets: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = paired()
    assert list(lines) == ["u9", "u7", "u5", "u4", "u3", "u2", "u1", "u0"]
    assert {key for key, line in lines.items() if line["kept"]} == {"u0", "u1", "u2", "u4"}
    for key, ms in (("u0", 37.0), ("u1", -60.0), ("u2", 37.0), ("u4", 37.0)):
        assert lines[key]["offset_ms"] == pytest.approx(ms, abs=1.0)
    first = read_index(sets[0])[0]
    assert (lines["u0"]["heard"], lines["u0"]["heard_sha256"]) == (first.name, first.sha256)
    assert lines["u0"]["set"] == read_index(sets[1]).hash and lines["u0"]["shard"] == "shard-000001.tar"
    reasons = {key: list(line["reasons"]) for key, line in lines.items() if not line["kept"]}
    assert reasons == {"u9": ["counterpart"], "u7": ["length"], "u5": ["drift"], "u3": ["correlation"]}
    assert lines["u5"]["drift_ms"] == pytest.approx(20.0, abs=1.0)
    assert (
        "pairs.jsonl: 4 of 8 utterances are paired, behind by -60 to 37" in (said := capsys.readouterr().out)
        and "; refused: counterpart 1, length 1, drift 1, correlation 1\n" in said
    )


def test_same_input_gives_same_bytes_for_any_number_of_workers(paired: Pairing, tmp_path: Path) -> None:
    paired()
    alone = (tmp_path / "pairs.jsonl").read_bytes()
    paired(loader_workers=2)
    assert (tmp_path / "pairs.jsonl").read_bytes() == alone


def test_limits_are_settings(paired: Pairing) -> None:
    lines = paired(most_ms=2000.0, correlation_at_least=0.0, drift_ms_at_most=30.0)
    assert {key for key, line in lines.items() if not line["kept"]} == {"u9"}


def test_sets_that_have_nothing_in_common_are_refused(paired: Pairing, sets: tuple[str, str], tmp_path: Path) -> None:
    others = write_audio(tmp_path / "others", [[flac("v0", speech(0), 8000)]])
    with pytest.raises(UserError, match=r"others: none of 1 utterances is paired with one of .*v0: .*has no such key"):
        paired(audio=others)
    twice = write_audio(tmp_path / "twice", [[flac("u0", speech(0), 8000)], [flac("u0", speech(1), 8000)]])
    with pytest.raises(
        UserError, match=r"twice: u0 is the key of two utterances, in .*-000000\.tar and in .*-000001\.tar; "
    ):
        paired(heard=twice)
    with pytest.raises(
        UserError, match=r"twice: u0 is the key of two utterances, in .*-000000\.tar and in .*-000001\.tar; "
    ):
        paired(audio=twice)
    with pytest.raises(UserError, match="would lie among what is read"):
        paired(output=f"{sets[0]}/pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_damaged_audio_is_a_reason(sets: tuple[str, str], tmp_path: Path) -> None:
    broken = write_audio(
        tmp_path / "b", [[Sample("u0", b"RIFF", "wav", {"seconds": 1.0}), flac("u1", speech(1), 8000)]]
    )
    pair(PairSettings(heard=broken, audio=broken, output=str(tmp_path / "pairs.jsonl")))
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert list(lines[0]["reasons"]) == ["audio"] and lines[1]["kept"] and lines[1]["offset_ms"] == 0.0


def test_either_may_be_several_sets(paired: Pairing, sets: tuple[str, str], tmp_path: Path) -> None:
    alone = paired()
    more = write_audio(tmp_path / "more", [[flac("v0", speech(40, 2.0, 16000), 16000)]])
    far = write_audio(
        tmp_path / "far",
        [[flac("v0", later(telephone(soxr.resample(speech(40, 2.0, 16000), 16000, 8000)), 20.0), 8000)]],
    )
    lines = paired(heard=[more, sets[0]], audio=[sets[1], far])
    assert list(lines) == [*alone, "v0"] and lines["v0"]["offset_ms"] == pytest.approx(20.0, abs=1.0)
    assert {key: line["kept"] for key, line in alone.items()} == {key: lines[key]["kept"] for key in alone}
    first = next(info for info in read_index([more, sets[0]]) if info.sha256 == alone["u0"]["heard_sha256"])
    assert lines["u0"]["heard"] == first.name
    with pytest.raises(UserError, match="would lie among what is read"):
        paired(audio=[sets[1], far], output=str(tmp_path / "far" / "pairs.jsonl"))
