"""Every way a file can be wrong, through `prepare` and through `label`: used rightly, or listed with a reason."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import Sample, read_index, read_shard, write_index, write_shard
from tests.joining import join

RATE, SECONDS = 8000, 0.6
FRAMES = 19  # of 30 ms, the last window whole


@functools.cache
def sound(container: str = "WAV", subtype: str | None = None, rate: int = RATE, channels: int = 1, seconds: float = SECONDS, gain: float = 0.3) -> bytes:  # fmt: skip
    """A hum with some noise, as a file."""
    time = np.arange(round(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * 300 * time) + 0.1 * np.random.default_rng(0).normal(size=len(time))
    data = io.BytesIO()
    wave = np.clip(gain * wave, -1, 1) if gain < 100 else wave * gain
    soundfile.write(data, np.repeat(wave[:, None], channels, 1), rate, format=container, subtype=subtype)
    return data.getvalue()


def constant(value: float, seconds: float = SECONDS) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.full(round(seconds * RATE), value), RATE, format="WAV", subtype="FLOAT")
    return data.getvalue()


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def id3(size: int, body: bytes) -> bytes:
    return b"ID3\4\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + body


def archive() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        header = tarfile.TarInfo("a.wav")
        header.size = len(sound())
        tar.addfile(header, io.BytesIO(sound()))
    return data.getvalue()


def riff(*chunks: tuple[bytes, bytes], size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(data)) + data for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def wav_format(kind: int = 1, channels: int = 1, rate: int = RATE, bits: int = 16) -> bytes:
    step = max(channels * bits // 8, 1) & 0xFFFF
    return struct.pack("<HHIIHH", kind, channels, rate, (rate * step) & 0xFFFFFFFF, step, bits)


PCM = sound()[44:]
FMT = (b"fmt ", wav_format())

GOOD: dict[str, Callable[[], bytes]] = {
    "24 bits": lambda: sound("WAV", "PCM_24"),
    "32-bit integers": lambda: sound("WAV", "PCM_32"),
    "32-bit floats": lambda: sound("WAV", "FLOAT"),
    "64-bit floats": lambda: sound("WAV", "DOUBLE"),
    "8 bits": lambda: sound("WAV", "PCM_U8"),
    "A-law": lambda: sound("WAV", "ALAW"),
    "u-law": lambda: sound("WAV", "ULAW"),
    "extensible WAV": lambda: sound("WAVEX", "PCM_16"),
    "RF64": lambda: sound("RF64", "PCM_16"),
    "8 channels": lambda: sound("WAV", "PCM_16", channels=8),
    "FLAC of 8 channels": lambda: sound("FLAC", channels=8),
    "11025 Hz": lambda: sound(rate=11025),
    "12345 Hz": lambda: sound(rate=12345),
    "192000 Hz": lambda: sound(rate=192000),
    "MP3": lambda: sound("MP3"),
    "MP3 behind an ID3 tag of garbage": lambda: id3(300, bytes(range(256)) + b"\xff\xfb\x90\x64" * 11) + sound("MP3"),
    "MP3 before an old tag": lambda: sound("MP3") + b"TAG" + b"\xff" * 125,
    "Vorbis": lambda: sound("OGG", "VORBIS"),
    "Opus": lambda: sound("OGG", "OPUS"),
    "silence": lambda: constant(0.0),
    "nothing but an offset": lambda: constant(0.5),
    "clipped": lambda: sound(gain=20.0),
    "a whisper": lambda: sound(gain=1e-4),
    "chunks before the sound": lambda: riff((b"LIST", b"INFO" * 5), FMT, (b"junk", bytes(31) + b"\0"), (b"data", PCM)),
    "a lying RIFF length": lambda: riff(FMT, (b"data", PCM), size=7),
    "FLAC with a wrong MD5 and right frames": lambda: patched(sound("FLAC"), 26, b"\1" * 16),
    "FLAC without its MD5": lambda: patched(sound("FLAC"), 26, bytes(16)),
}

TORN = "truncated|damaged"
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"empty \(0 bytes\)"),
    "one byte": (lambda: b"R", "not audio"),
    "text": (lambda: b"seven three nine\n" * 40, "not audio"),
    "an error page": (lambda: b"<html><head><title>403 Forbidden</title></head></html>\n" * 9, "not audio"),
    "an error of an object store": (lambda: b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "not audio"),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "not audio"),
    "a tar": (archive, "not audio"),
    "gzip": (lambda: b"\x1f\x8b\x08\0" + zlib.compress(sound()), "not audio"),
    "zeros": (lambda: bytes(4096), "not audio"),
    "WebM": (lambda: b"\x1a\x45\xdf\xa3" + bytes(range(256)) * 4, "WebM or Matroska is not read here; .*ffmpeg"),
    "MP4": (lambda: b"\0\0\0\x20ftypM4A " + bytes(2000), "MP4 .* is not read here; .*ffmpeg"),
    "CAF": (lambda: sound("CAF"), "is not read here"),
    "headerless PCM": (lambda: PCM, f"not audio|{TORN}"),
    "a byte-order mark before RIFF": (lambda: b"\xef\xbb\xbf" + sound(), "not audio"),
    "a WAV header": (lambda: sound()[:44], TORN),
    "a WAV of no samples": (lambda: riff(FMT, (b"data", b"")), "zero length"),
    "a WAV without format": (lambda: riff((b"data", PCM)), TORN),
    "a WAV without sound": (lambda: riff(FMT, (b"LIST", b"INFO")), TORN),
    "0 Hz": (lambda: riff((b"fmt ", wav_format(rate=0)), (b"data", PCM)), f"{TORN}|0 Hz"),
    "3 Hz": (lambda: riff((b"fmt ", wav_format(rate=3)), (b"data", PCM)), "3 Hz"),
    "4 GHz": (lambda: riff((b"fmt ", wav_format(rate=2**32 - 1)), (b"data", PCM)), f"{TORN}|Hz"),
    "0 channels": (lambda: riff((b"fmt ", wav_format(channels=0)), (b"data", PCM)), f"{TORN}|0 channels"),
    "65535 channels": (lambda: riff((b"fmt ", wav_format(channels=65535)), (b"data", PCM)), f"{TORN}|channels"),
    "0 bits": (lambda: riff((b"fmt ", wav_format(bits=0)), (b"data", PCM)), TORN),
    "an unknown codec": (lambda: riff((b"fmt ", wav_format(kind=0xBEEF)), (b"data", PCM)), "codec 0xBEEF of 16 bits is not read here; convert it: ffmpeg"),
    "a gigabyte promised": (lambda: patched(sound(), 40, struct.pack("<I", 1 << 30)), TORN),
    "a format chunk of a gigabyte": (lambda: patched(sound(), 16, struct.pack("<I", 1 << 30)), TORN),
    "a FLAC of 2^36 samples": (lambda: patched(sound("FLAC"), 21, b"\xff" * 5), "longer than|not state|" + TORN),
    "a FLAC that promises more": (lambda: patched(sound("FLAC"), 22, struct.pack(">I", RATE)), TORN),
    "a FLAC whose frame is damaged": (lambda: patched(sound("FLAC"), len(sound("FLAC")) // 2, b"\0\xff\0"), TORN),
    "a FLAC header": (lambda: sound("FLAC")[:42], f"zero length|{TORN}"),
    "a Vorbis page with a wrong checksum": (lambda: patched(sound("OGG", "VORBIS"), 22, b"\0\1\2\3"), TORN),
    "an Opus with a damaged page": (lambda: patched(sound("OGG", "OPUS"), 2000, b"\x55\xaa"), TORN),
    "an ID3 tag and nothing else": (lambda: id3(300, bytes(300)), f"not audio|{TORN}"),
    "an ID3 tag longer than the file": (lambda: id3(1 << 27, b"") + sound("MP3"), f"not audio|{TORN}|cannot be"),
    "half an MP3": (lambda: sound("MP3")[: len(sound("MP3")) // 2], TORN),
    "NaN": (lambda: constant(float("nan")), "not numbers"),
    "one infinite sample": (lambda: patched(constant(0.1), 400, struct.pack("<f", np.inf)), "not numbers"),
    "integers as floats": (lambda: sound("WAV", "FLOAT", gain=20000.0), "full scale"),
    "too long": (lambda: sound(seconds=2.5), "longer than max_seconds 2"),
    "too long FLAC": (lambda: sound("FLAC", seconds=2.5), "longer than max_seconds 2"),
    "a sleeping recorder": (lambda: constant(0.0, 2.01), "longer than max_seconds 2"),
    **{
        f"{kind} cut at {share:.0%}": (lambda kind=kind, share=share: cut(kind, share), f"zero length|not audio|{TORN}")
        for kind in ("WAV", "FLAC", "MP3", "VORBIS", "OPUS")
        for share in (0.01, 0.2, 0.6, 0.97)
    },
}  # fmt: skip


def cut(kind: str, share: float) -> bytes:
    data = sound("OGG", kind) if kind in ("VORBIS", "OPUS") else sound(kind)
    return data[: max(int(len(data) * share), 1)]


def key_of(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


def reasons_of(output: str) -> dict[str, str]:
    lines = (Path(output) / "quarantine.jsonl").read_text().splitlines()
    reasons = {value["key"]: value["reason"] for value in map(json.loads, lines)}
    assert len(reasons) == len(lines)
    return reasons


def check_reasons(reasons: dict[str, str], expected: dict[str, str]) -> None:
    assert reasons.keys() == expected.keys()
    for key, pattern in expected.items():
        assert re.search(pattern, reasons[key]), (key, reasons[key])
        assert "\n" not in reasons[key] and not re.search(r"object at 0x|Errno|\w+Error|Traceback", reasons[key])


@pytest.fixture
def little_memory() -> object:
    """Room for a gigabyte more than there is: what a header promises must not be allocated."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
def test_prepare_uses_or_names_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    extensions = ("wav", "flac", "mp3", "ogg", "opus")  # chosen without a look at the content
    lines, expected = [], {}
    for number, (name, (make, pattern)) in enumerate([*[(name, (make, "")) for name, make in GOOD.items()], *BAD.items()]):  # fmt: skip
        key = key_of(name)
        file = folder / f"{key}.{extensions[number % 5]}"
        file.write_bytes(make())
        lines.append({"audio": file.name})
        if pattern:
            expected[key] = f"^{re.escape(str(file))}: .*({pattern})"
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(f"{key_of('Vorbis')}.{extensions[list(GOOD).index('Vorbis') % 5]}")
    (folder / "nowhere").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    with open(folder / "sparse", "wb") as sparse:
        sparse.truncate(1 << 42)
    for name, pattern in {
        "folder": "is a folder, a pipe or a device", "pipe": "is a folder, a pipe or a device", "link": "",
        "nowhere": "no such audio file", "loop": "no such audio file", "sparse": "4398046511104 bytes", "x" * 300: "File name too long",
        "nowhere/x": "no such audio file", "link/x": "no such audio file",
    }.items():  # fmt: skip
        key = key_of(name)[-9:]
        lines.append({"audio": name, "key": key})
        if pattern:
            expected[key] = pattern
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = PrepareSettings(
        manifest=str(folder / "list.jsonl"), output=str(tmp_path / "shards"), samples_per_shard=20, max_bad_share=0.9, max_seconds=2
    )  # fmt: skip
    prepare(settings)
    written = len(GOOD) + 1
    assert f"{len(lines)} utterances in = {written} written + {len(expected)} quarantined" in capsys.readouterr().out
    check_reasons(reasons_of(settings.output), expected)
    samples = [s for info in read_index(settings.output) for s in read_shard(Path(settings.output) / info.name)]
    assert [sample.key for sample in samples] == [*map(key_of, GOOD), "link"]
    assert all(sample.fields["seconds"] == pytest.approx(SECONDS, abs=0.001) for sample in samples)


@pytest.mark.usefixtures("little_memory")
def test_label_uses_or_names_every_utterance(
    job: Callable[..., LabelSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards made by somebody else hold whatever bytes, under whatever extension, next to good ones."""
    bad = BAD | {
        "one sample": (lambda: riff(FMT, (b"data", b"\1\0")), "too short"),
        "a sample less than a frame": (lambda: riff(FMT, (b"data", PCM[: 2 * (360 - 1)])), "too short: 359 samples"),
    }
    cases = [(name, make, "") for name, make in GOOD.items()] + [(name, *case) for name, case in bad.items()]
    extensions = ("wav", "flac", "mp3", "ogg", "opus")
    samples = [
        Sample(key_of(name), make(), extensions[number % 5], {"seconds": SECONDS})
        for number, (name, make, _) in enumerate(sorted(cases, key=lambda case: zlib.crc32(case[0].encode())))
    ]
    audio = tmp_path / "audio"
    audio.mkdir()
    infos = [write_shard(audio / f"shard-{n:06d}.tar", samples[20 * n : 20 * n + 20]) for n in range(-(-len(samples) // 20))]  # fmt: skip
    write_index(audio, infos)
    settings = job(audio=str(audio), max_bad_share=0.9, max_seconds=2)
    label(settings)
    account = f"{len(samples)} utterances in = {len(GOOD)} labelled + {len(bad)} quarantined"
    assert account in capsys.readouterr().out
    check_reasons(reasons_of(settings.output), {key_of(name): pattern for name, _, pattern in cases if pattern})
    targets = {
        sample.key: target
        for info in infos
        for sample, target in join(audio / info.name, Path(settings.output) / info.name, audio_sha256=info.sha256)
    }
    assert targets.keys() == set(map(key_of, GOOD))
    assert {key: target.frames for key, target in targets.items()} == dict.fromkeys(targets, FRAMES)
    best = {key: target.units[target.starts] for key, target in targets.items()}
    for name in ("32-bit integers", "32-bit floats", "64-bit floats", "extensible WAV", "RF64", "8 channels", "a lying RIFF length"):  # fmt: skip
        assert np.mean(best[key_of(name)] == best["24-bits"]) > 0.9, f"{name}: another answer to the same sound"
