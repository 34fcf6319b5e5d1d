from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_kd.audio.decode import decode, to_flac
from asr_kd.errors import UserError
from asr_kd.shards import prepare as prepare_module
from asr_kd.shards.leases import sole_writer
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import Sample, read_checked, read_index, read_shard

RATE = 8000


def hum(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return np.repeat(0.3 * np.sin(2 * np.pi * 250 * time)[:, None], channels, axis=1)


def write_manifest(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A manifest of ten utterances in WAV, FLAC, MP3, Ogg Vorbis and Opus, of several rates, the odd ones stereo."""
    folder = tmp_path / "source"
    folder.mkdir()
    kinds = (
        ("wav", "WAV", None),
        ("flac", "FLAC", None),
        ("mp3", "MP3", None),
        ("ogg", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
    )
    lines = []
    for number in range(10):
        extension, container, subtype = kinds[number % 5]
        rate = (8000, 16000)[number // 5]
        sound = hum(0.2 + 0.05 * number, rate, 1 + number % 2)
        soundfile.write(folder / f"u{number}.{extension}", sound, rate, format=container, subtype=subtype)
        lines.append({"audio": f"u{number}.{extension}", "key": f"u{number}", "text": f"text {number}", "speaker": "x"})
    return write_manifest(folder, lines)


@pytest.fixture
def job(tmp_path: Path, source: Path) -> Callable[..., PrepareSettings]:
    def make(**changes: object) -> PrepareSettings:
        values = {"manifest": str(source), "output": str(tmp_path / "shards"), "samples_per_shard": 4}
        return PrepareSettings.model_validate(values | changes)

    return make


Job = Callable[..., PrepareSettings]
Dying = Callable[[int], AbstractContextManager[None]]


def samples_of(settings: PrepareSettings) -> list[Sample]:
    samples = []
    for info in read_index(settings.output):
        samples += read_checked(settings.output, info)
    return samples


def tree(folder: str | Path) -> dict[str, bytes]:
    """All that must be the same whoever worked, and however often."""
    paths = (
        path for path in Path(folder).rglob("*") if path.is_file() and path.name not in ("timing.json", "summary.json")
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def quarantined(settings: PrepareSettings) -> dict[str, str]:
    lines = map(json.loads, (Path(settings.output) / "quarantine.jsonl").read_text().splitlines())
    return {line["key"]: line["reason"] for line in lines}


def test_keeps_mono_bytes_and_makes_flac_of_the_rest(
    job: Job, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = job(sample_rate=8000)
    prepare(settings)
    assert "10 utterances in = 10 written + 0 quarantined" in capsys.readouterr().out
    assert [info.samples for info in read_index(settings.output)] == [4, 4, 2]
    for number, sample in enumerate(samples_of(settings)):
        assert sample.key == f"u{number}"
        assert sample.fields["text"] == f"text {number}" and sample.fields["speaker"] == "x"
        assert sample.fields["seconds"] == pytest.approx(0.2 + 0.05 * number, abs=1e-3)
        original = next(source.parent.glob(f"u{number}.*"))
        info = soundfile.info(io.BytesIO(sample.audio))
        assert (info.samplerate, info.channels) == (8000, 1)
        if number in (0, 2, 4):  # mono and 8 kHz already
            assert sample.audio == original.read_bytes() and sample.extension == original.suffix[1:]
        else:
            assert sample.extension == "flac" and info.subtype == "PCM_16"
        mine, _ = decode(sample.audio, "a", None, 10)
        theirs, _ = decode(original.read_bytes(), "a", 8000, 10)
        np.testing.assert_allclose(mine, theirs, atol=1 / 32768)


def test_wav_becomes_flac_where_that_is_asked_for(job: Job, tmp_path: Path) -> None:
    prepare(job())
    prepare(job(audio_format="flac", output=str(tmp_path / "flac")))
    plain, packed = samples_of(job()), samples_of(job(output=str(tmp_path / "flac")))
    assert {one.extension for one in plain} - {one.extension for one in packed} == {"wav"}
    for before, after in zip(plain, packed, strict=True):
        if before.extension == "wav":
            assert after.extension == "flac" and len(after.audio) < len(before.audio)
            heard = [decode(one.audio, one.key, None, 60.0) for one in (before, after)]
            assert np.array_equal(heard[0][0], heard[1][0]) and heard[0][1] == heard[1][1]
        else:
            assert after == before
    with pytest.raises(UserError, match="audio_format"):
        prepare(job(audio_format="flac"))


def test_without_a_rate_each_file_keeps_its_own(job: Job) -> None:
    prepare(job())
    rates = [soundfile.info(io.BytesIO(sample.audio)).samplerate for sample in samples_of(job())]
    assert rates == [8000] * 5 + [16000] * 5


def test_loud_sound_is_turned_down_not_clipped() -> None:
    sound = 2 * hum(0.1)[:, 0].astype(np.float32) / 0.3
    waveform, _ = decode(to_flac(sound, RATE), "a", None, 10)
    np.testing.assert_allclose(waveform, sound / 2, atol=1e-4)
    exact = np.arange(-32768, 32768, dtype=np.float32) / 32768
    np.testing.assert_array_equal(decode(to_flac(exact, RATE), "a", None, 10)[0], exact)


def test_dropped_text_is_nowhere(job: Job) -> None:
    prepare(job(drop_text=True))
    assert all(sample.fields.keys() == {"speaker", "seconds"} for sample in samples_of(job()))
    assert not any(b"text 3" in data for data in tree(job().output).values())


def spoil(source: Path) -> dict[str, str]:
    """Make seven of the ten utterances bad; key → start of the reason."""
    folder = source.parent
    (folder / "u0.wav").unlink()
    (folder / "u1.flac").write_bytes(b"")
    (folder / "u2.mp3").write_text("not audio")
    cut = (folder / "u3.ogg").read_bytes()
    (folder / "u3.ogg").write_bytes(cut[: len(cut) * 2 // 3])
    soundfile.write(folder / "u5.wav", np.zeros((0, 1)), RATE)
    soundfile.write(folder / "u8.ogg", np.full(800, np.nan), RATE, format="WAV", subtype="FLOAT")
    soundfile.write(folder / "u9.opus", hum(3.0), RATE, format="WAV")
    reasons = {
        "u0": "no such audio file",
        "u1": "empty (0 bytes)",
        "u2": "not audio",
        "u3": "",
        "u5": "holds no samples",
    }
    reasons |= {"u8": "holds samples that are not numbers", "u9": "3.0 s, longer than max_seconds 2"}
    return {key: f"{next(folder.glob(key + '.*'), folder / 'u0.wav')}: {reason}" for key, reason in reasons.items()}


@pytest.mark.parametrize(("name", "text"), [("none", "It’s  TWO, "), ("basic", "its two"), ("english", "it is 2")])
def test_texts_are_normalised_where_that_is_asked_for(tmp_path: Path, name: str, text: str) -> None:
    soundfile.write(tmp_path / "u.wav", hum(0.2), RATE)
    manifest = write_manifest(tmp_path, [{"audio": "u.wav", "text": "It’s  TWO, "}])
    output = str(tmp_path / "shards")
    prepare(PrepareSettings.model_validate({"manifest": str(manifest), "output": output, "normalizer": name}))
    assert next(read_shard(tmp_path / "shards" / "shard-000000.tar")).fields["text"] == text
    other = "basic" if name == "none" else "none"
    with pytest.raises(UserError, match=r"shards: belongs to other settings \(normalizer was"):
        prepare(PrepareSettings.model_validate({"manifest": str(manifest), "output": output, "normalizer": other}))


def test_bad_audio_is_quarantined_and_counted(job: Job, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = spoil(source)
    settings = job(max_bad_share=0.8, max_seconds=2)
    prepare(settings)
    assert "10 utterances in = 3 written + 7 quarantined" in capsys.readouterr().out
    reasons = quarantined(settings)
    assert list(reasons) == list(expected)
    assert all(reasons[key].startswith(start) for key, start in expected.items())
    assert [sample.key for sample in samples_of(settings)] == ["u4", "u6", "u7"]
    # the first shard held nothing but bad audio: its number stays free, so that the others keep theirs
    assert [info.name for info in read_index(settings.output)] == ["shard-000001.tar"]
    assert not (Path(settings.output) / "shard-000000.tar").exists()


def test_too_much_bad_audio_fails_after_the_account(job: Job, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(source)
    settings = job(max_bad_share=0.69, max_seconds=2)
    message = r"list\.jsonl: 7 of 10 utterances cannot be used, more than max_bad_share 0\.69 \(first: u0: .*no such audio file"
    with pytest.raises(UserError, match=message):
        prepare(settings)
    assert "10 utterances in = 3 written + 7 quarantined" in capsys.readouterr().out
    assert len(quarantined(settings)) == 7
    with pytest.raises(UserError, match=r"holds no shards \(index\.json is missing\)"):
        read_index(settings.output)
    prepare(job(max_bad_share=0.7, max_seconds=2))  # allowed later, nothing is decoded again
    assert len(samples_of(settings)) == 3


def test_nothing_left_is_a_failure(job: Job, source: Path) -> None:
    for path in source.parent.glob("u*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 10 utterances can be used .first: u0: "):
        prepare(job(max_bad_share=1.0))
    assert not (Path(job().output) / "index.json").exists()


@pytest.mark.parametrize("line", ['{"key": "u1", "audio": "u1.flac"}', "{", '{"key": "v", "audio": 3}'])
def test_a_wrong_manifest_writes_nothing(job: Job, source: Path, line: str) -> None:
    with open(source, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"list\.jsonl, line 11: "):
        prepare(job())
    assert not Path(job().output).exists()


@pytest.mark.parametrize("content", [None, ""])
def test_a_missing_or_empty_manifest_writes_nothing(job: Job, source: Path, content: str | None) -> None:
    source.unlink()
    if content is not None:
        source.write_text(content)
    with pytest.raises(UserError, match=r"list\.jsonl: (no such manifest|this manifest holds no utterances)"):
        prepare(job())
    assert not Path(job().output).exists()


@pytest.mark.parametrize("output", [".", "data/shards"])
def test_an_output_in_the_folder_that_is_the_manifest_is_refused(
    job: Job, source: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(UserError, match=r"^output: .* lies in .*, which is the manifest; name a folder outside of it"):
        prepare(job(manifest=str(source.parent), output=output))
    assert sorted(source.parent.rglob("*")) == before


def test_a_store_that_is_only_read_is_refused_as_an_output(job: Job) -> None:
    with pytest.raises(
        UserError, match=r"^http://host/shards: http:// is only read here; write to a local folder, s3://"
    ):
        prepare(job(output="http://host/shards"))


def test_output_of_others_is_refused(job: Job, source: Path, tmp_path: Path) -> None:
    prepare(job())
    before = tree(job().output)
    with pytest.raises(UserError, match=r"belongs to other settings \(sample_rate was null, now 8000\)"):
        prepare(job(sample_rate=8000))
    source.write_text(source.read_text().replace("text 3", "another"))
    with pytest.raises(
        UserError,
        match=r"belongs to other settings \(manifest: \S+list\.jsonl does not hold what this output was made from\)",
    ):
        prepare(job())
    assert tree(job().output) == before
    with pytest.raises(UserError, match="is not empty and was not written by `asr-kd prepare`"):
        prepare(job(output=str(source.parent)))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        prepare(job(output=str(tmp_path / "file")))


def test_finished_shards_are_not_made_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(job())
    before = tree(job().output)
    decoded = []
    real = prepare_module.read_audio
    monkeypatch.setattr(
        prepare_module, "read_audio", lambda data, name, *rest: decoded.append(name) or real(data, name, *rest)
    )
    prepare(job())
    assert not decoded and tree(job().output) == before
    (Path(job().output) / "shard-000001.tar").unlink()
    prepare(job())
    assert [Path(name).stem for name in decoded] == ["u4", "u5", "u6", "u7"] and tree(job().output) == before


def test_killed_at_every_publish(job: Job, tmp_path: Path, source: Path, dying_at_publish: Dying) -> None:
    (source.parent / "u6.flac").write_bytes(b"")
    settings = job(max_bad_share=0.1)
    prepare(settings)
    expected = tree(settings.output)
    for stop in range(len(expected)):
        again = job(max_bad_share=0.1, output=str(tmp_path / f"killed-{stop}"))
        with dying_at_publish(stop):
            prepare(again)
        assert not (Path(again.output) / "index.json").exists()
        prepare(again)
        assert tree(again.output) == expected


def test_killed_by_sigkill_and_started_again(job: Job, source: Path, tmp_path: Path) -> None:
    lines = [
        {"audio": f"u{number % 10}.{extension}", "key": f"v{number}"}
        for number in range(200)
        for extension in [("wav", "flac", "mp3", "ogg", "opus")[number % 5]]
    ]
    manifest = write_manifest(tmp_path, [{**line, "audio": f"source/{line['audio']}"} for line in lines])
    wanted = {"manifest": str(manifest), "samples_per_shard": 10, "sample_rate": 8000}
    prepare(job(**wanted, output=str(tmp_path / "whole")))
    expected = tree(tmp_path / "whole")
    output = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "asr_kd.cli",
        "prepare",
        *(f"{k}={v}" for k, v in wanted.items()),
        f"output={output}",
    ]
    for shards in (1, 6, 13):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(output.glob("*.tar"))) < shards:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
    subprocess.run(command, check=True, capture_output=True)
    assert tree(output) == expected


def test_what_another_process_prepares_is_left_alone(job: Job) -> None:
    settings = job()
    prepare(settings)
    expected = tree(settings.output)
    with (
        sole_writer(settings.output),
        pytest.raises(UserError, match=f"shards: is being written by process {os.getpid()} on "),
    ):
        prepare(settings)
    assert tree(settings.output) == expected
    prepare(settings)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_job_whatever_it_is_doing(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Within libsndfile as elsewhere: nothing swallows it, and the job does not end as if it were done."""
    soundfile.write(source.parent / "long.flac", hum(20.0), RATE)
    lines = [
        {"audio": "source/long.flac", "key": f"v{index}", **({"start": 1, "end": 9} if index % 2 else {})}
        for index in range(4000)
    ]
    manifest = write_manifest(tmp_path, lines)
    # started in the background, tests inherit that Ctrl-C is ignored
    listening = functools.partial(signal.signal, number, signal.SIG_DFL)
    for attempt in range(3):
        output = tmp_path / f"{number.name}-{attempt}"
        command = [
            sys.executable,
            "-m",
            "asr_kd.cli",
            "prepare",
            f"manifest={manifest}",
            f"output={output}",
            "samples_per_shard=5",
        ]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=listening
        ) as process:
            while process.poll() is None and len(list(output.glob("*.tar"))) < 2 + attempt:
                time.sleep(0.001)
            process.send_signal(number)
            _, said = process.communicate()
        assert process.returncode == 128 + number and "interrupted" in said and "Traceback" not in said
        assert not (output / "index.json").exists()
