from __future__ import annotations

import io
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio.decode import decode
from asr_kd.audio.live import microphone_sound, pipe_sound
from asr_kd.errors import AudioError, UserError


class Pipe(io.BytesIO):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        super().__init__(data)
        self.sizes, self.turn = sizes, 0

    def read1(self, size: int | None = -1, /) -> bytes:
        self.turn += 1
        return self.read(min(size or 1, self.sizes[self.turn % len(self.sizes)]))


def sound(samples: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.9, 0.9, (samples, channels)).astype(np.float32)


def wav(samples: int, channels: int = 1, subtype: str = "PCM_16", rate: int = 8000, kind: str = "WAV") -> bytes:
    data = io.BytesIO()
    soundfile.write(data, sound(samples, channels), rate, format=kind, subtype=subtype)
    return data.getvalue()


def heard(data: bytes, sizes: list[int] | None = None, rate: int = 8000, raw_rate: int | None = 8000) -> np.ndarray:
    return np.concatenate(
        [np.empty(0, np.float32), *pipe_sound(Pipe(data, sizes or [4096]), "pipe", rate, raw_rate, 0.1)]
    )


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4), channels=st.integers(1, 3), samples=st.integers(1, 2000),
    subtype=st.sampled_from(["PCM_16", "PCM_24", "PCM_32", "PCM_U8", "ULAW", "ALAW", "FLOAT", "DOUBLE"]), rate=st.sampled_from([8000, 16000]),
    kind=st.sampled_from(["WAV", "WAVEX", "RF64"]),
)  # fmt: skip
def test_a_wav_in_a_pipe_is_what_the_file_is(
    sizes: list[int], channels: int, samples: int, subtype: str, rate: int, kind: str
) -> None:
    data = wav(samples, channels, subtype, rate, kind)
    expected, _ = decode(data, "file", 8000, 10.0)
    found = heard(data, sizes)
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("stated", [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x00\xf0\xff\x7f"])
def test_a_pipes_header_need_not_know_the_length(stated: bytes) -> None:
    data = bytearray(wav(500))
    at = data.find(b"data") + 4
    data[4:8] = data[at : at + 4] = stated
    assert len(heard(bytes(data))) == 500


def test_what_follows_the_sound_is_no_sound() -> None:
    assert len(heard(wav(500) + b"LIST" + b"\4\0\0\0abcd")) == 500


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    share=st.floats(0.05, 0.95),
    front=st.booleans(),
    chunk=st.booleans(),
    count=st.integers(1, 3),
)
def test_all_of_joined_and_unfinished_wavs_is_heard(
    sizes: list[int], share: float, front: bool, chunk: bool, count: int
) -> None:
    one, whole = wav(500), bytearray(wav(500))
    whole[40:44] = struct.pack("<I", int(share * 500) * 2)  # the recorder died
    tag = b"ID3\4\0\0\0\0\0\7\0\0\0\0\0\0\0" if front else b""
    pieces = (tag + one + (b"LIST\3\0\0\0abc\0" if chunk else b"")) * count
    found = heard(pieces + tag + bytes(whole), sizes)
    np.testing.assert_array_equal(found, np.tile(heard(one), count + 1))


def test_a_wav_of_another_rate_behind_is_refused() -> None:
    with pytest.raises(AudioError, match=r"pipe: a WAV of another sample rate follows \(16000 Hz\)"):
        heard(wav(100) + wav(100, rate=16000))


OTHERS = {
    "AIFF": wav(100, kind="AIFF"), "AU": wav(100, kind="AU"), "CAF": wav(100, kind="CAF"), "Wave64": wav(100, kind="W64"), "NIST SPHERE": wav(100, kind="NIST"),
    "FLAC": wav(100, kind="FLAC"), "Ogg with Vorbis": wav(100, kind="OGG", subtype="VORBIS"), "Ogg with Opus": wav(100, kind="OGG", subtype="OPUS"),
    "VOC": wav(100, kind="VOC"), "IRCAM": wav(100, kind="IRCAM"), "IFF": wav(100, kind="SVX"), "PARIS": wav(100, kind="PAF"), "AVR": wav(100, kind="AVR"),
    "MP3": wav(3000, kind="MP3", subtype="MPEG_LAYER_III"), "MP4": b"\0\0\0\x1cftypM4A \0\0\2\0", "WebM": bytes.fromhex("1a45dfa39f4286810142f781"), "AMR": b"#!AMR\n\x04\x38\x67\xdf\x3f\x73",
    "WMA": bytes.fromhex("3026b2758e66cf11a6d900aa"), "AAC": b"\xff\xf1\x50\x80\x04\x1f\xfc" + bytes(25) + b"\xff\xf1\x50\x80\x04\x1f\xfc",
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_containers_are_never_heard_as_samples(what: str) -> None:
    for front in (b"", b"ID3\3\0\0\0\0\0\3abc"):
        with pytest.raises(
            AudioError,
            match=rf"^pipe: {what}.*, where WAV or raw PCM is heard as it comes; pipe WAV: ffmpeg -i FILE\.\w+ -f wav -",
        ):
            heard(front + OTHERS[what] + bytes(400), [7], raw_rate=None)
    if what not in ("MP3", "AAC"):  # which two bytes tell
        with pytest.raises(AudioError, match=what):
            heard(OTHERS[what], raw_rate=8000)
    else:
        assert len(heard((OTHERS[what] + bytes(9))[:40], raw_rate=8000)) == 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0\0\0", "not audio but gzip"),
        (b"<!DOCTYPE html><title>404", "web page"),
        (b'{"error": 1}  ', "JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\nRIFF", "a server's answer"),
        ("one two é\n".encode() * 47, "not audio but text; pipe WAV"),
    ],
)
def test_what_is_no_sound_is_named(data: bytes, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        heard(data, raw_rate=None)


@pytest.mark.parametrize(
    "head",
    [
        b"\xff\xfb\x90\x64",
        b"\xff\xff\xff\xff",
        b"\xff\xf1\0\0",
        b"\xff\xfd\x40\0",
        b"OggT",
        b"RIFX",
        b"\xff\xff\0\0",
        b"fLa\0",
        b"[\0\1\0",
    ],
)
def test_raw_sound_that_begins_like_something_else_is_heard(head: bytes) -> None:
    raw = head + (sound(600)[:, 0] * 32767).astype("<i2").tobytes()
    np.testing.assert_array_equal(heard(raw, [7], raw_rate=None), np.frombuffer(raw, "<i2").astype(np.float32) / 32768)


def test_channels_that_cancel_out_are_refused_at_the_end() -> None:
    data = io.BytesIO()
    left = sound(2000)[:, 0]
    soundfile.write(data, np.stack([left, -left], axis=1), 8000, format="WAV")
    pieces = pipe_sound(Pipe(data.getvalue(), [4096]), "pipe", 8000, None, 0.1)
    with pytest.raises(AudioError, match="pipe: its 2 channels cancel out"):
        list(pieces)


@pytest.mark.parametrize("samples", [0, 1, 5, 6, 3000])
def test_raw_sound_has_the_rate_that_is_said(samples: int) -> None:
    raw = (sound(samples)[:, 0] * 32767).astype("<i2")
    np.testing.assert_array_equal(heard(raw.tobytes(), [7]), raw.astype(np.float32) / 32768)
    assert len(heard(raw.tobytes(), raw_rate=16000)) == pytest.approx(samples / 2, abs=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            lambda: wav(100, kind="FLAC"),
            "FLAC, where WAV or raw PCM is heard as it comes; pipe WAV: ffmpeg -i FILE.flac -f wav -, or give the file",
        ),
        (lambda: wav(100, subtype="IMA_ADPCM"), "WAV with IMA ADPCM of 4 bits is not read here; pipe 16-bit PCM"),
        (lambda: wav(100)[:30], "without sound behind it"),
        (lambda: wav(100)[:-1], "ends before the length that its WAV header states"),
        (lambda: b"\1" * 15, "ends within a sample"),
        (lambda: wav(100, subtype="FLOAT")[:-400] + b"\0\0\xc0\x7f" * 100, "not numbers"),
        (lambda: wav(100)[:22] + b"\0\0" + wav(100)[24:], "its header says 8000 Hz and 0 channels; it is damaged"),
    ],
)
def test_what_cannot_be_heard_is_said(data: Callable[[], bytes], message: str) -> None:
    with pytest.raises(AudioError, match=rf"pipe: .*{message}|pipe: {message}"):
        heard(data())


def fake_sounddevice(pieces: list[np.ndarray]) -> Any:
    module: Any = types.ModuleType("sounddevice")
    module.PortAudioError = type("PortAudioError", (Exception,), {})

    class InputStream:
        def __init__(self, rate: int, blocksize: int, channels: int, dtype: str, callback: Callable[..., None]) -> None:
            if not pieces:
                raise module.PortAudioError("Error querying device -1")
            assert (rate, blocksize, channels, dtype) == (8000, 800, 1, "float32")
            for piece in pieces:
                callback(piece[:, None], len(piece), None, None)

        def __enter__(self) -> InputStream:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    module.InputStream = InputStream
    return module


def test_a_microphone(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [np.full(800, value, np.float32) for value in (0.1, 0.2)]
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice(pieces))
    found = microphone_sound(8000, 0.1)
    assert [next(found)[0], next(found)[0]] == [np.float32(0.1), np.float32(0.2)]


def test_no_microphone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice([]))
    with pytest.raises(UserError, match=r"microphone: cannot be opened at 8000 Hz .*pipe sound in and give -"):
        next(microphone_sound(8000, 0.1))
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UserError, match=r"microphone: needs the extra mic; .*asr-kd\[mic\]"):
        next(microphone_sound(8000, 0.1))
