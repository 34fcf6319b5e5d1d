from __future__ import annotations

import functools
import io
import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio.decode import decode, read_audio, read_blocks, seconds_of, wav_as_flac
from asr_kd.errors import AudioError

KINDS = {
    "wav": ("WAV", "PCM_16"),
    "wav24": ("WAV", "PCM_24"),
    "wav8": ("WAV", "PCM_U8"),
    "wavfloat": ("WAV", "FLOAT"),
    "wavulaw": ("WAV", "ULAW"),
    "wavex": ("WAVEX", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A hum and some noise: float64 [samples, channels]."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    return np.repeat((0.3 * np.sin(2 * np.pi * 300 * time) + noise)[:, None], channels, axis=1)


@functools.cache
def encoded(kind: str, seconds: float = 2.0, rate: int = 16000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    container, subtype = KINDS[kind]
    soundfile.write(file, tone(seconds, rate, channels), rate, format=container, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (48000, 1), (48000, 6)])
def test_reads_every_kind(kind: str, rate: int, channels: int) -> None:
    channels = min(channels, 2) if kind == "mp3" else channels
    audio = read_audio(encoded(kind, 0.5, rate, channels), "a", None, 10)
    assert (audio.rate, audio.source_rate, audio.source_channels) == (rate, rate, channels)
    assert audio.extension == ("wav" if kind.startswith("wav") else kind)
    assert audio.waveform.dtype == np.float32 and audio.waveform.shape == (rate // 2,)
    expected = tone(0.5, rate)[:, 0]
    assert np.corrcoef(audio.waveform, expected)[0, 1] > 0.99
    waveform, converted = decode(encoded(kind, 0.5, rate, channels), "a", 16000, 10)
    assert converted == 16000 and abs(len(waveform) - 8000) <= 1 and np.isfinite(waveform).all()


def test_pcm_is_exact_and_channels_are_averaged() -> None:
    steps = np.random.default_rng(0).integers(-32768, 32768, (4000, 2)).astype(np.int16)
    for container in ("WAV", "FLAC"):
        file = io.BytesIO()
        soundfile.write(file, steps, 8000, format=container)
        waveform, _ = decode(file.getvalue(), "a", None, 10)
        np.testing.assert_array_equal(waveform * 65536, steps.astype(np.int64).sum(axis=1))


def test_conversion_keeps_the_tone_and_the_length() -> None:
    waveform, _ = decode(encoded("wav", 2.0, 44100), "a", 16000, 10)
    assert len(waveform) == 32000
    assert np.argmax(np.abs(np.fft.rfft(waveform))) == 600  # 300 Hz in bins of half a hertz


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99, 0.999])
def test_cut_files_are_refused(kind: str, share: float) -> None:
    data = encoded(kind)
    with pytest.raises(AudioError, match=r"^a\.x: [^\n]+$"):
        decode(data[: int(len(data) * share)], "a.x", 16000, 10)


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_ogg_cut_between_pages_is_refused(kind: str) -> None:
    data = encoded(kind, 8.0)
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"OggS"]
    assert len(starts) > 5
    for start in starts[2:]:
        with pytest.raises(AudioError, match="truncated"):
            decode(data[:start], "a", None, 10)


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_an_ogg_page_that_comes_twice_is_refused(kind: str) -> None:
    data = encoded(kind, 8.0)
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"OggS"]
    for first, second in itertools.pairwise(starts[1:]):
        with pytest.raises(AudioError, match=rf"damaged at byte {second} .an Ogg page comes twice"):
            decode(data[:second] + data[first:second] + data[second:], "a", None, 10)


@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_cut_between_frames_is_refused(channels: int) -> None:
    data = encoded("mp3", 1.0, 16000, channels)
    starts = [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] & 0xE0 == 0xE0]
    assert len(starts) > 20
    for start in starts[1:]:
        with pytest.raises(AudioError, match=r"truncated|damaged|not audio"):
            decode(data[:start], "a", None, 10)


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus"])
def test_checksums_find_a_flipped_byte(kind: str) -> None:
    data = bytearray(encoded(kind))
    data[len(data) // 2] ^= 0x55
    with pytest.raises(AudioError, match="damaged"):
        decode(bytes(data), "a", None, 10)


def wav(
    samples: bytes = b"\1\0" * 800,
    rate: int = 8000,
    channels: int = 1,
    bits: int = 16,
    kind: int = 1,
    size: int | None = None,
) -> bytes:
    """A WAV file whose header says what it is told to."""
    size = len(samples) if size is None else size
    step = max(channels * bits // 8, 1) & 0xFFFF
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, kind, channels, rate, (rate * step) & 0xFFFFFFFF, step, bits, b"data", size)  # fmt: skip
    return head + samples


def floats(*values: float) -> bytes:
    return wav(np.array(values * 100, np.float32).tobytes(), bits=32, kind=3)


def other(container: str) -> Callable[[], bytes]:
    def make() -> bytes:
        file = io.BytesIO()
        soundfile.write(file, tone(0.5, 8000), 8000, format=container)
        return file.getvalue()

    return make


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"empty \(0 bytes\)"),
    "one byte": (lambda: b"R", "not audio"),
    "zeros": (lambda: bytes(5000), "not audio"),
    "text": (lambda: b"one two three\n" * 100, "not audio"),
    "a web page": (lambda: b"<!DOCTYPE html><html><body>404</body></html>" * 20, "not audio"),
    "JSON": (lambda: b'{"error": "no such object"}', "not audio"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, "not audio"),
    "a zip": (lambda: b"PK\3\4" + bytes(range(256)) * 4, "not audio"),
    "a pickle": (lambda: b"\x80\4\x95" + bytes(range(256)), "not audio"),
    "noise": (lambda: np.random.default_rng(5).bytes(3000), "not audio|truncated|damaged"),
    "only RIFF": (lambda: b"RIFF", "not audio|truncated"),
    "a WAV header's half": (lambda: wav()[:20], "truncated"),
    "a WAV without sound": (lambda: wav()[:36], "truncated"),
    "a WAV of zero length": (lambda: wav(b""), "zero length"),
    "an Ogg of zero length": (lambda: encoded("ogg", 0.0), "zero length|truncated|damaged"),
    "a WAV that promises more": (lambda: wav(size=100000), "truncated, its header says 100000 bytes of sound and 1600"),
    "rate 0": (lambda: wav(rate=0), "damaged|header says 0 Hz"),
    "rate 1": (lambda: wav(rate=1), "header says 1 Hz"),
    "rate of billions": (lambda: wav(rate=2**31 - 1), "header says|damaged"),
    "no channels": (lambda: wav(channels=0), "damaged|header says"),
    "60,000 channels": (lambda: wav(channels=60000), "damaged|header says|60000 channels"),
    "500 channels": (lambda: wav(b"\1\0" * 50000, channels=500), "500 channels"),
    "0 bits": (lambda: wav(bits=0), "damaged|cannot be decoded"),
    "77 bits": (lambda: wav(bits=77), "damaged|cannot be decoded"),
    "an unknown codec": (
        lambda: wav(kind=0x7777),
        "WAV with codec 0x7777 of 16 bits is not read here; convert it: ffmpeg",
    ),
    "NaN": (lambda: floats(0.0, float("nan")), r"not numbers \(NaN or infinite\)"),
    "infinite": (lambda: floats(0.0, float("inf")), "not numbers"),
    "minus infinite": (lambda: floats(float("-inf"), 0.1), "not numbers"),
    "double beyond single": (lambda: wav(np.full(100, 1e300).tobytes(), bits=64, kind=3), "not numbers"),
    "integers as floats": (lambda: floats(3000.0, -20000.0), r"reach 2e\+04 where full scale is 1"),
    "too long": (lambda: encoded("wav", 11.0), "11.0 s, longer than max_seconds 10; cut it or raise max_seconds"),
    "too long FLAC": (lambda: encoded("flac", 10.1), "longer than max_seconds"),
    "too long Opus": (lambda: encoded("opus", 10.1), "longer than max_seconds"),
    "too long at a low rate": (lambda: wav(b"\1\0" * 20000, rate=1000), "longer than max_seconds"),
    "IRCAM": (other("IRCAM"), "IRCAM is not read here; give WAV.*ffmpeg -i bad.sf "),
    "CAF": (other("CAF"), "CAF is not read here; give WAV.*ffmpeg -i bad.caf "),
    "two rates": (
        lambda: encoded("ogg") + encoded("opus", rate=8000),
        r"different sample rates were joined in it \(8000, 16000 Hz\)",
    ),
    "an Ogg page torn out": (lambda: torn(encoded("ogg", 8.0)), "truncated or damaged"),
    "MP3 with a hole": (lambda: encoded("mp3")[:3000] + bytes(4000) + encoded("mp3")[7000:], "damaged at byte 3"),
    "FLAC with a hole": (lambda: encoded("flac")[:9000] + bytes(4000) + encoded("flac")[13000:], "damaged"),
    "FLAC that promises a day": (
        lambda: promising(24 * 3600 * 16000),
        r"truncated, its header says 86400\.000 s and 2\.000 s are there; fetch .*ffmpeg",
    ),
    "FLAC that promises more": (lambda: promising(40000), "truncated|damaged"),
}


def torn(data: bytes) -> bytes:
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"OggS"]
    return data[: starts[4]] + data[starts[5] :]


def promising(samples: int) -> bytes:
    data = bytearray(encoded("flac"))
    data[22:26] = struct.pack(">I", samples)
    return bytes(data)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("rate", [None, 16000])
def test_bad_audio_gets_one_sentence(case: str, rate: int | None) -> None:
    make, message = BAD[case]
    with pytest.raises(AudioError, match=message) as caught:
        decode(make(), "speech/a.wav", rate, 10)
    sentence = str(caught.value)
    assert sentence.startswith("speech/a.wav: ") and "\n" not in sentence and "object at 0x" not in sentence


def test_a_single_sample_does_not_crash() -> None:
    waveform, _ = decode(wav(b"\1\0"), "a", None, 10)
    assert len(waveform) == 1
    try:
        assert len(decode(wav(b"\1\0"), "a", 16000, 10)[0])
    except AudioError as error:
        assert "too short" in str(error)


def test_trailing_tags_are_no_damage() -> None:
    assert len(decode(encoded("mp3") + b"TAG" + bytes(125), "a", None, 10)[0]) == 32000
    assert len(decode(encoded("wav") + b"LIST\4\0\0\0INFO", "a", None, 10)[0]) == 32000


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_damaged_files_give_sound_or_one_sentence(kind: str, data: st.DataObject) -> None:
    original = bytearray(encoded(kind, 0.5, 8000))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(original) - 1) | st.integers(0, 120))
        original[at] = data.draw(st.integers(0, 255))
    try:
        waveform, rate = decode(bytes(original), "a", data.draw(st.sampled_from([None, 8000])), 10)
    except AudioError as error:
        assert str(error).startswith("a: ")
    else:
        assert waveform.dtype == np.float32 and 0 < len(waveform) <= 10 * rate and np.isfinite(waveform).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [8000, 16000])
def test_block_by_block_it_is_the_same(kind: str, rate: int, tmp_path: Path) -> None:
    data = encoded(kind, 2.0, 16000, 2)
    path = tmp_path / "sound.raw"  # the name says nothing
    path.write_bytes(data)
    expected, _ = decode(data, "a", rate, 10)
    for seconds in (0.03, 0.7, 5.0):
        found = np.concatenate(list(read_blocks(path, "a", rate, seconds)))
        assert len(found) == len(expected)
        np.testing.assert_allclose(found, expected, atol=2e-4 if kind == "mp3" else 0)
    assert seconds_of(path, "a") == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("case", [name for name in BAD if "too long" not in name])
def test_block_by_block_it_finds_what_is_bad(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    path = tmp_path / "sound"
    path.write_bytes(make())
    with pytest.raises(AudioError, match=message):
        list(read_blocks(path, "clip", 16000, 0.5))


@pytest.mark.parametrize("kind", ["wav", "wav8", "wav24", "wavex"])
def test_wav_as_flac_is_heard_the_same_to_the_last_bit(kind: str) -> None:
    container, subtype = KINDS[kind]
    sound = np.append(np.random.default_rng(0).uniform(-1, 1, 4000), [-1.0, 1.0, 0.0])
    file = io.BytesIO()
    soundfile.write(file, sound, 8000, format=container, subtype=subtype)
    flac = wav_as_flac(file.getvalue())
    assert flac is not None and flac[:4] == b"fLaC"
    before, after = (soundfile.read(io.BytesIO(data), dtype="float64")[0] for data in (file.getvalue(), flac))
    assert np.array_equal(before, after)


@pytest.mark.parametrize("kind", ["wavfloat", "wavulaw"])
def test_what_flac_cannot_hold_as_it_is_stays(kind: str) -> None:
    file = io.BytesIO()
    container, subtype = KINDS[kind]
    soundfile.write(file, np.zeros(100), 8000, format=container, subtype=subtype)
    assert wav_as_flac(file.getvalue()) is None
