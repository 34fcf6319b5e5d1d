from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.cli import main
from asr_kd.decoding.decoder import make_decoder
from asr_kd.decoding.settings import DecodingSettings, TranscribeSettings
from asr_kd.decoding.transcribe import transcribe, transcribe_files, transcribe_shards
from asr_kd.errors import AudioError, UserError
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, write_index, write_shard
from asr_kd.shards.texts import train_units


def wav(seconds: float, seed: int = 0) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.random.default_rng(seed).normal(0, 0.1, int(8000 * seconds)), 8000, format="WAV")
    return data.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("model")
    (root / "text.txt").write_text("one two three\n" * 3)
    units = train_units(UnitsSettings(source=str(root / "text.txt"), output=str(root / "units"), kind="char", size=20))
    torch.manual_seed(1)
    settings, features = ModelSettings(layers=1, size=8), FeatureSettings(sample_rate=8000, mels=8)
    model = build_model(settings, features.dimension, units.size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)
    save_checkpoint(root / "model", model, units, features, settings)
    return str(root / "model")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    samples = [
        Sample(f"u{index}", wav(0.5 + 0.3 * index, index), "wav", {"seconds": 0.5 + 0.3 * index}) for index in range(3)
    ]
    samples.insert(1, Sample("broken", b"RIFF", "wav", {}))
    (tmp_path / "shards").mkdir()
    write_index(tmp_path / "shards", [write_shard(tmp_path / "shards" / "shard-000000.tar", samples)])
    return str(tmp_path / "shards")


def test_a_set_of_shards_reads_like_its_recordings(
    folder: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "texts.jsonl"
    transcribe_shards(
        TranscribeSettings(
            checkpoint=folder, audio=shards, output=str(output), max_bad_share=0.5, batch_frames=60, device="cpu"
        )
    )
    texts = read_transcripts(output)
    assert list(texts) == ["u0", "u1", "u2"]
    assert any(texts.values())
    checkpoint = load_checkpoint(folder)
    decoder = make_decoder(DecodingSettings(), checkpoint)
    for index, key in enumerate(texts):
        assert transcribe(checkpoint, decoder, wav(0.5 + 0.3 * index, index), key)[0].text == texts[key]
    captured = capsys.readouterr()
    assert "left out broken" in captured.err
    assert "3 texts, 1 utterances left out" in captured.out


def test_a_set_as_n_best_lists(folder: str, shards: str, tmp_path: Path) -> None:
    output = tmp_path / "lists.jsonl"
    settings = TranscribeSettings(
        checkpoint=folder,
        audio=shards,
        output=str(output),
        device="cpu",
        decoder="beam",
        beam=5,
        nbest=4,
        max_bad_share=0.5,
    )
    transcribe_shards(settings)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["u0", "u1", "u2"]
    for line in lines:
        assert set(line) == {"key", "text", "nbest"} and 2 <= len(line["nbest"]) <= 4
        assert line["nbest"][0]["text"] == line["text"] and {len(one) for one in line["nbest"]} == {2}
        scores = [one["score"] for one in line["nbest"]]
        assert scores == sorted(scores, reverse=True)


def test_too_much_unreadable_audio_writes_nothing(folder: str, shards: str, tmp_path: Path) -> None:
    output = tmp_path / "texts.jsonl"
    with pytest.raises(UserError, match=r"1 of 4 utterances cannot be read, .*broken"):
        transcribe_shards(TranscribeSettings(checkpoint=folder, audio=shards, output=str(output), device="cpu"))
    assert not output.exists()


def test_files(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("a.wav", "b.wav")]
    for seed, name in enumerate(names):
        Path(name).write_bytes(wav(1.0, seed))
    settings = TranscribeSettings(checkpoint=folder, decoder="beam", beam=2, device="cpu")
    transcribe_files(settings, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == names
    transcribe_files(settings, names[:1])
    assert capsys.readouterr().out.rstrip("\n") == lines[0].split("\t")[1]


def test_files_behind_a_bad_one_are_transcribed(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(tmp_path / name) for name in ("missing.wav", "cut.wav", "a.wav")]
    Path(names[1]).write_bytes(b"RIFF")
    Path(names[2]).write_bytes(wav(1.0))
    assert main(["transcribe", f"checkpoint={folder}", "device=cpu", *names]) == 2
    seen = capsys.readouterr()
    assert [line.split("\t")[0] for line in seen.out.splitlines()] == names[2:]
    assert all(name in seen.err for name in names[:2]) and "2 of 3 files could not be transcribed" in seen.err


class Interrupted(io.BytesIO):
    """A pipe in which Ctrl-C is heard where it would end."""

    def read1(self, size: int | None = -1) -> bytes:
        data = super().read1(size)
        if not data:
            raise KeyboardInterrupt
        return data


def test_ctrl_c_ends_a_stream_with_its_text(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = np.random.default_rng(0).integers(-9000, 9000, 16_000, np.int16).tobytes()
    shown = []
    for pipe in (io.BytesIO(sound), Interrupted(sound)):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe))
        assert main(["transcribe", f"checkpoint={folder}", "device=cpu", "--stream", "-"]) == 0
        shown.append(capsys.readouterr().out.splitlines()[-1])
    assert shown[0] == shown[1] != ""


def test_bad_recordings_are_named(folder: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    decoder = make_decoder(DecodingSettings(), checkpoint)
    for data in (b"", b"text", wav(0.01), wav(3.0)):
        with pytest.raises(AudioError, match="clip"):
            transcribe(checkpoint, decoder, data, "clip", max_seconds=2.0)
    with pytest.raises(UserError, match=r"missing.wav: cannot be read"):
        transcribe_files(TranscribeSettings(checkpoint=folder, device="cpu"), [str(tmp_path / "missing.wav")])


def test_texts_are_json_lines_of_unicode(folder: str, shards: str, tmp_path: Path) -> None:
    output = tmp_path / "texts.jsonl"
    transcribe_shards(
        TranscribeSettings(checkpoint=folder, audio=shards, output=str(output), max_bad_share=1.0, device="cpu")
    )
    assert all(set(json.loads(line)) == {"key", "text"} for line in output.read_text().splitlines())


def test_nothing_transcribed_is_a_failure(folder: str, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    shard = write_shard(tmp_path / "bad" / "shard-000000.tar", [Sample("a", b"", "wav", {})])
    write_index(tmp_path / "bad", [shard])
    output = tmp_path / "texts.jsonl"
    settings = TranscribeSettings(
        checkpoint=folder, audio=str(tmp_path / "bad"), output=str(output), max_bad_share=1.0, device="cpu"
    )
    with pytest.raises(UserError, match=r"none of 1 utterances can be read \(first: a: .*fix them$"):
        transcribe_shards(settings)
    assert not output.exists()


def test_details_are_json_lines(folder: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.wav").write_bytes(wav(1.0))
    settings = TranscribeSettings(checkpoint=folder, decoder="beam", nbest=3, details=True, device="cpu")
    transcribe_files(settings, [str(tmp_path / "a.wav")])
    line = json.loads(capsys.readouterr().out)
    assert line["file"] == str(tmp_path / "a.wav")
    assert " ".join(word["word"] for word in line["words"]) == line["text"] == line["nbest"][0]["text"]
    assert len(line["nbest"]) == 3
    for one in (line, *line["nbest"]):
        for word in one["words"]:
            assert "".join(token["token"] for token in word["tokens"]).removeprefix("▁") == word["word"]
            assert (word["start"], word["end"]) == (word["tokens"][0]["start"], word["tokens"][-1]["end"])
    assert all(0 <= word["start"] < word["end"] <= 1.0 and 0 <= word["confidence"] <= 1 for word in line["words"])
    output = tmp_path / "texts.jsonl"
    values = settings.model_dump() | {"audio": shards, "output": str(output), "max_bad_share": 0.5}
    transcribe_shards(TranscribeSettings(**values))
    assert all({"key", "text", "words", "nbest"} == set(json.loads(line)) for line in output.read_text().splitlines())
    assert len(read_transcripts(output)) == 3


def test_a_long_file_reads_like_a_short_one(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "a.wav")
    Path(file).write_bytes(wav(14.0))
    for window in (5.0, 60.0):
        transcribe_files(TranscribeSettings(checkpoint=folder, window_seconds=window, device="cpu"), [file])
    windowed, whole = capsys.readouterr().out.splitlines()
    assert windowed == whole != ""


def test_a_file_that_is_cut_says_what_its_utterances_say(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = [np.random.default_rng(seed).normal(0, 0.1, 8000 * seconds) for seed, seconds in ((1, 2), (2, 3))]
    quiet = [np.random.default_rng(seed).normal(0, 1e-4, 8000 * 2) for seed in range(3)]
    sound = np.concatenate([quiet[0], loud[0], quiet[1], loud[1], quiet[2]])
    soundfile.write(tmp_path / "a.wav", sound, 8000)
    soundfile.write(tmp_path / "quiet.wav", np.concatenate(quiet), 8000)
    manifest = tmp_path / "a.jsonl"
    manifest.write_text(json.dumps({"audio": "a.wav"}) + "\n")
    assert main(["prepare", f"manifest={manifest}", f"output={tmp_path / 'cut'}", "segment={detector: energy}"]) == 0
    of_shards, files = tmp_path / "texts.jsonl", [str(tmp_path / name) for name in ("a.wav", "quiet.wav")]
    words = ["transcribe", f"checkpoint={folder}", "device=cpu", "details=true"]
    assert main([*words, f"audio={tmp_path / 'cut'}", f"output={of_shards}"]) == 0
    capsys.readouterr()
    assert main([*words, "segment={detector: energy}", *files]) == 0
    heard, silent = map(json.loads, capsys.readouterr().out.splitlines())
    said = [json.loads(line) for line in of_shards.read_text().splitlines()]
    assert len(said) == 2 and all(one["text"] for one in said)
    assert heard["text"] == " ".join(one["text"] for one in said)
    assert "nbest" not in heard and silent["text"] == ""
    # the second utterance, with 0.2 s before it, begins when the first is over
    places = [word["start"] - own["start"] for word, own in zip(heard["words"][len(said[0]["words"]) :], said[1]["words"], strict=True)]  # fmt: skip
    assert places == pytest.approx([5.8] * len(places), abs=0.04)
    assert all(word["tokens"][0]["start"] == word["start"] for word in heard["words"])


def test_a_stream_ends_with_the_text_of_the_file(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(wav(2.0))
    assert main(["transcribe", f"checkpoint={folder}", "device=cpu", str(file)]) == 0
    text = capsys.readouterr().out.strip()
    assert main(["transcribe", "--stream", f"checkpoint={folder}", "device=cpu", str(file), "piece_ms=70"]) == 0
    streamed = capsys.readouterr()
    assert streamed.out.splitlines()[-1] == text
    assert len(streamed.out.splitlines()) > len(text.split())
    assert "words, known" in streamed.err
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(file.read_bytes())))
    assert main(["transcribe", f"checkpoint={folder}", "device=cpu", "--stream", "-", "details=true"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1] == {"event": "end", "text": text}
    assert " ".join(line["word"] for line in events if line["event"] == "final") == text
    assert {"heard", "word", "start", "end", "confidence", "tokens", "latency", "compute"} < set(events[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stream", "a.wav", "b.wav"], "--stream hears one source"),
        (["-"], "standard input .*with --stream"),
        (["--stream", "missing.wav"], "missing.wav: cannot be read"),
        (["--stream", "a.wav", "audio=x", "output=y"], "stream hears a file, - or the microphone"),
        (["--stream", "a.wav", "segment={}"], "segment cuts files"),
        (["audio=x", "output=y", "segment={}"], "is cut by prepare segment"),
        (["a.wav", "lm=x.arpa"], "lm needs a beam search"),
        (["a.wav", "decoder=beam", "lm=missing.arpa"], "missing.arpa: language model: cannot be read"),
        (["a.wav", "window_seconds=1.0"], "window_seconds"),
        ([""], "an empty word where an audio file belongs"),
        (["--stream", "a.wav", "raw_rate=8000"], "raw_rate: a.wav is not raw sound"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    folder: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["transcribe", f"checkpoint={folder}", "device=cpu", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1


def test_closed_standard_input(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["transcribe", f"checkpoint={folder}", "device=cpu", "--stream", "-"]) == 2
    assert "standard input: is closed" in capsys.readouterr().err


def test_a_container_on_standard_input_is_no_raw_sound(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.BytesIO()
    soundfile.write(data, np.random.default_rng(0).normal(0, 0.1, 8000), 8000, format="AIFF")
    for more in ([], ["raw_rate=8000"]):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data.getvalue())))
        assert main(["transcribe", f"checkpoint={folder}", "device=cpu", "--stream", "-", *more]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and "standard input: AIFF, where WAV or raw PCM is heard" in shown.err


def test_an_array_is_heard_with_its_rate_or_refused(folder: str) -> None:
    checkpoint = load_checkpoint(folder, torch.device("cpu"))
    decoder = make_decoder(TranscribeSettings(checkpoint=folder), checkpoint)
    samples = np.random.default_rng(3).integers(-9000, 9000, (16000, 2)).astype(np.int16)
    data = io.BytesIO()
    soundfile.write(data, samples, 16000, format="WAV")
    expected = transcribe(checkpoint, decoder, data.getvalue(), "a")[0].text
    assert transcribe(checkpoint, decoder, (samples, 16000), "a")[0].text == expected != ""
    for wrong in (
        samples,
        samples.astype(np.float32),
        (samples, None),
        (samples.T, 16000),
        (samples.astype(np.int64), 16000),
    ):
        with pytest.raises(AudioError, match=r"^a: "):
            transcribe(checkpoint, decoder, wrong, "a")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["index.json", "shard-000000.tar", "../{folder}/index.json"])
def test_output_over_its_own_audio_is_refused(name: str, folder: str, shards: str, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "audio")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    output = str(copy / name.format(folder="audio"))
    with pytest.raises(UserError, match=r"belongs to the audio set; name another file"):
        transcribe_shards(TranscribeSettings(checkpoint=folder, audio=str(copy), output=output, device="cpu"))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_an_empty_set(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_index(tmp_path / "empty", [])
    settings = TranscribeSettings(checkpoint=folder, audio=str(tmp_path / "empty"), output=str(tmp_path / "o"))
    with pytest.raises(UserError, match="empty: holds no utterances"):
        transcribe_shards(settings)
    assert not (tmp_path / "o").exists()


def test_a_name_that_the_terminal_cannot_show(folder: str, tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + b"/a\xff.wav"
    Path(os.fsdecode(file)).write_bytes(wav(1.0))
    words: list[str | bytes] = [sys.executable, "-m", "asr_kd.cli", "transcribe", f"checkpoint={folder}", file, file]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, check=True
    )
    assert done.stdout.count(b"/a\\udcff.wav\t") == 2


def test_several_sets_are_transcribed_as_one_unless_they_share_keys(folder: str, shards: str, tmp_path: Path) -> None:
    output, wanted = tmp_path / "texts.jsonl", {"checkpoint": folder, "max_bad_share": 0.5, "device": "cpu"}
    (tmp_path / "other").mkdir()
    write_index(
        tmp_path / "other", [write_shard(tmp_path / "other" / "shard-000000.tar", [Sample("v", wav(1.0), "wav", {})])]
    )
    transcribe_shards(
        TranscribeSettings.model_validate({**wanted, "audio": [shards, str(tmp_path / "other")], "output": str(output)})
    )
    assert list(read_transcripts(output)) == ["u0", "u1", "u2", "v"]
    output.unlink()
    (tmp_path / "again").mkdir()
    again = [write_shard(tmp_path / "again" / "shard-000000.tar", [Sample("u1", wav(1.0, 9), "wav", {})])]
    write_index(tmp_path / "again", again)
    settings = TranscribeSettings.model_validate(
        {**wanted, "audio": [shards, str(tmp_path / "again")], "output": str(output)}
    )
    with pytest.raises(
        UserError, match=r"output \S+: u1 is the key of two utterances, in \S+/shards/\S+ and in \S+/again/"
    ):
        transcribe_shards(settings)
    index = tmp_path / "again" / "index.json"
    with pytest.raises(UserError, match="belongs to the audio set"):
        transcribe_shards(settings.model_copy(update={"output": str(index)}))
    assert not output.exists()
