"""The job around a Whisper or Moonshine model; the model itself is played by `Echo` (the real ones: `test_whisper.py`)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_kd.cli import main
from asr_kd.decoding import pseudo_labels, whisper
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.decoding.transcribe import transcribe_shards
from asr_kd.decoding.whisper import Heard
from asr_kd.errors import UserError
from asr_kd.shards.chosen import Chosen
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, write_index, write_shard
from asr_kd.shards.texts import train_units

#: what Echo hears in sounds of so many tenths of a second
SAID = {
    5: Heard("One, two!", -0.2, 0.1, "en"),
    6: Heard("three", -1.5, 0.1, "en"),
    7: Heard("four", -1.2, 0.9, "en"),
    8: Heard("five " * 40, -0.2, 0.1, "en"),
    9: Heard("", None, None, "en"),
    10: Heard("Room 101", -0.3, 0.9, "en"),  # sure of what it hears
}


class Echo:
    fingerprint = "echo"

    def __init__(self) -> None:
        self.heard = 0
        self.die_at = 10_000

    def __call__(self, sound: np.ndarray) -> Heard:
        assert sound.dtype == np.float32 and len(sound) <= 30 * whisper.RATE
        self.heard += 1
        if self.heard == self.die_at:
            raise KeyboardInterrupt
        return SAID.get(round(10 * len(sound) / whisper.RATE), Heard("long", -0.4, 0.2, "de"))


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    made = Echo()
    monkeypatch.setattr(pseudo_labels, "load_recogniser", lambda *_: made)
    return made


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "whisper"}')
    return str(tmp_path / "model")


def flac(seconds: float) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, int(8000 * seconds))
    soundfile.write(data, noise, 8000, format="FLAC")
    return data.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> str:
    (tmp_path / "shards").mkdir()
    infos = []
    for number, lengths in enumerate([(0.5, 0.6, 0.7), (0.8, 0.9, 1.0), (0.5, 40.0)]):
        samples = [Sample(f"u{number}{at}", flac(one), "flac", {"seconds": one}) for at, one in enumerate(lengths)]
        infos.append(write_shard(tmp_path / "shards" / f"shard-{number:06d}.tar", samples))
    write_index(tmp_path / "shards", infos)
    return str(tmp_path / "shards")


def lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text().splitlines())


def settings(model: str, shards: str, output: Path, **whisper: Any) -> TranscribeSettings:
    values = {"checkpoint": model, "audio": shards, "output": str(output), "device": "cpu", "whisper": whisper}
    return TranscribeSettings.model_validate(values)


def test_every_utterance_is_written_once_with_its_reason(
    echo: Echo, model: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "texts.jsonl"
    transcribe_shards(settings(model, shards, output))
    assert read_transcripts(output) == {"u00": "one two", "u12": "room 101", "u20": "one two", "u21": "long long"}
    rest = list(lines(tmp_path / "texts.left-out.jsonl"))
    assert {line["key"]: line["why"] for line in rest} == {
        "u01": "avg_logprob", "u02": "no_speech_prob", "u10": "compression_ratio", "u11": "no_words",
    }  # fmt: skip
    both = "no_speech_prob 0.9 is above whisper.max_no_speech_prob 0.6, and avg_logprob -1.2 is below whisper.min_avg_logprob -1"
    assert rest[1]["reason"] == both
    assert rest[0]["reason"] == "avg_logprob -1.5 is below whisper.min_avg_logprob -1" and rest[0]["text"] == "three"
    said = capsys.readouterr().out
    assert "8 utterances in = 4 texts + 4 left out" in said
    assert "avg_logprob 1, compression_ratio 1, no_speech_prob 1, no_words 1" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model",
        "shards",
        "texts.jsonl",
        "texts.left-out.jsonl",
    ]


def test_a_long_utterance_has_the_times_of_its_pieces(echo: Echo, model: str, shards: str, tmp_path: Path) -> None:
    transcribe_shards(settings(model, shards, tmp_path / "texts.jsonl"))
    found = next(line for line in lines(tmp_path / "texts.jsonl") if line["key"] == "u21")
    first, second = found["segments"]
    assert first["start"] == 0.0 and 15 <= first["end"] == second["start"] <= 27 and second["end"] == 40.0
    assert set(first) == {"start", "end", "text", "avg_logprob", "no_speech_prob", "compression_ratio", "language"}
    assert (found["language"], found["avg_logprob"], found["no_speech_prob"]) == ("de", -0.4, 0.2)


def test_the_texts_are_a_list_of_what_is_used(echo: Echo, model: str, shards: str, tmp_path: Path) -> None:
    transcribe_shards(settings(model, shards, tmp_path / "texts.jsonl"))
    chosen = Chosen(tmp_path / "texts.jsonl", shards)
    assert (chosen.shards.samples, chosen.left_out) == (4, 4)
    assert chosen.keys("shard-000001.tar") == {"u12"}


def test_killed_and_started_again_it_hears_nothing_twice(echo: Echo, model: str, shards: str, tmp_path: Path) -> None:
    transcribe_shards(settings(model, shards, tmp_path / "once.jsonl"))
    echo.heard, echo.die_at = 0, 6
    output = tmp_path / "texts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        transcribe_shards(settings(model, shards, output))
    assert not output.exists()
    with pytest.raises(UserError, match=r"texts.jsonl.parts: belongs to other settings \(beam was 5, now 1\)"):
        transcribe_shards(settings(model, shards, output, beam=1))
    echo.heard, echo.die_at = 0, 10_000
    transcribe_shards(settings(model, shards, output))
    assert echo.heard == 3 + 1 + 2  # the second shard anew, the third: one utterance of two pieces
    for name in ("texts.jsonl", "texts.left-out.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / name.replace("texts", "once")).read_bytes()


def test_thresholds_are_settings(echo: Echo, model: str, shards: str, tmp_path: Path) -> None:
    off = {"min_avg_logprob": None, "max_no_speech_prob": None, "max_compression_ratio": None}
    transcribe_shards(settings(model, shards, tmp_path / "texts.jsonl", **off))
    assert [line["why"] for line in lines(tmp_path / "texts.left-out.jsonl")] == ["no_words"]


def test_without_a_bound_on_certainty_silence_is_a_reason_by_itself(
    echo: Echo, model: str, shards: str, tmp_path: Path
) -> None:
    transcribe_shards(settings(model, shards, tmp_path / "texts.jsonl", min_avg_logprob=None))
    rest = {line["key"]: line["why"] for line in lines(tmp_path / "texts.left-out.jsonl")}
    assert rest == {"u02": "no_speech_prob", "u10": "compression_ratio", "u11": "no_words", "u12": "no_speech_prob"}


def test_one_bad_piece_leaves_an_utterance_out(
    echo: Echo, model: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = iter([Heard("long", -0.4, 0.9, "en"), Heard("you", -1.4, 0.1, "en")])
    known = Echo.__call__
    monkeypatch.setattr(
        Echo, "__call__", lambda self, sound: next(heard) if len(sound) > 5 * whisper.RATE else known(self, sound)
    )
    transcribe_shards(settings(model, shards, tmp_path / "texts.jsonl"))
    rest = {line["key"]: line["why"] for line in lines(tmp_path / "texts.left-out.jsonl")}
    assert rest["u21"] == "avg_logprob"


def test_texts_are_written_as_the_units_write_them(
    echo: Echo, model: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("ONE TWO THREE FOUR FIVE LONG ROOM\n")
    units = str(tmp_path / "units")
    train_units(UnitsSettings(source=str(tmp_path / "text.txt"), output=units, kind="char", size=40))
    transcribe_shards(settings(model, shards, tmp_path / "texts.jsonl", units=units))
    assert read_transcripts(tmp_path / "texts.jsonl") == {"u00": "ONE TWO", "u20": "ONE TWO", "u21": "LONG LONG"}
    rest = {line["key"]: line["reason"] for line in lines(tmp_path / "texts.left-out.jsonl")}
    assert rest["u12"] == "holds '101', which no unit covers"
    said = capsys.readouterr().out
    assert "1 texts hold characters that no unit covers:" in said and "whisper.numerals=false" in said


def test_unreadable_audio_is_named_and_counted(echo: Echo, model: str, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    samples = [
        Sample("cut", b"fLaC", "flac", {}),
        Sample("tiny", flac(0.05), "flac", {}),
        Sample("good", flac(0.5), "flac", {}),
    ]
    write_index(tmp_path / "bad", [write_shard(tmp_path / "bad" / "shard-000000.tar", samples)])
    wanted = settings(model, str(tmp_path / "bad"), tmp_path / "texts.jsonl")
    with pytest.raises(UserError, match=r"2 of 3 utterances cannot be read, more than max_bad_share 0\.01"):
        transcribe_shards(wanted)
    assert not (tmp_path / "texts.jsonl").exists()
    transcribe_shards(wanted.model_copy(update={"max_bad_share": 0.7}))
    rest = list(lines(tmp_path / "texts.left-out.jsonl"))
    assert [(line["key"], line["why"]) for line in rest] == [("cut", "unreadable"), ("tiny", "unreadable")]
    assert rest[1]["reason"].startswith("too short: 0.050 s")


def test_a_broken_network_writes_nothing(
    echo: Echo, model: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAID, 8, Heard("a", math.nan, 0.1, "en"))
    with pytest.raises(UserError, match="u10: the network's output is NaN"):
        transcribe_shards(settings(model, shards, tmp_path / "texts.jsonl"))
    assert not (tmp_path / "texts.jsonl").exists()


def test_nothing_kept_is_a_failure(echo: Echo, model: str, shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of 8 texts is kept \(avg_logprob .*see the settings of whisper"):
        transcribe_shards(settings(model, shards, tmp_path / "texts.jsonl", min_avg_logprob=-0.1))
    assert not (tmp_path / "texts.jsonl").exists()


def test_files(echo: Echo, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds in (("a", 0.5), ("b", 0.6)):
        (tmp_path / f"{name}.flac").write_bytes(flac(seconds))
    files = [str(tmp_path / f"{name}.flac") for name in "ab"]
    assert main(["transcribe", f"checkpoint={model}", "device=cpu", *files]) == 0
    seen = capsys.readouterr()
    assert seen.out.splitlines() == [f"{files[0]}\tone two", f"{files[1]}\tthree"]
    assert "b.flac: doubtful: avg_logprob -1.5 is below" in seen.err
    assert (
        main(
            ["transcribe", f"checkpoint={model}", "device=cpu", "details=true", "whisper={normalizer: none}", files[0]]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "One, two!" and found["segments"][0]["end"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stream", "a.wav"], "hears whole utterances, and cannot --stream"),
        (["a.wav", "decoder=beam"], "decoder: belongs to CTC models"),
        (["a.wav", "whisper={language: English}"], "language"),
        (["a.wav", "whisper={piece_seconds: 31.0}"], "piece_seconds"),
        (["a.wav", "whisper={units: x, normalizer: none}"], "units bring their own normaliser"),
        (["a.wav", "whisper={units: missing}"], "missing: holds no units.model"),
    ],
)
def test_what_does_not_fit_is_said(
    echo: Echo, model: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transcribe", f"checkpoint={model}", "device=cpu", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_model_of_the_hub(
    echo: Echo, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(pseudo_labels, "fetched", lambda name: (asked.append(name), Path(model))[1])
    (tmp_path / "a.flac").write_bytes(flac(0.5))
    assert main(["transcribe", "checkpoint=hf:openai/whisper-base@main", "device=cpu", str(tmp_path / "a.flac")]) == 0
    assert capsys.readouterr().out == "one two\n" and asked == ["hf:openai/whisper-base@main"]


def test_its_settings_belong_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", f"checkpoint={tmp_path}", "whisper={beam: 2}", "a.wav"]) == 2
    assert "whisper: belongs to Whisper and Moonshine models" in capsys.readouterr().err


def test_settings_that_are_not_used_are_not_written() -> None:
    plain = TranscribeSettings(checkpoint="x")
    assert "whisper" not in plain.model_dump() and TranscribeSettings(**plain.model_dump()) == plain
