"""AIFF, AU, Wave64 and NIST SPHERE: the sound that libsndfile reads, and nothing less or more than their headers state."""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio.decode import decode, measure, read_audio, read_blocks
from asr_kd.errors import AudioError

KINDS = {
    "aiff": ("AIFF", "PCM_16", "FILE"), "aiff24": ("AIFF", "PCM_24", "FILE"), "aiff8": ("AIFF", "PCM_S8", "FILE"), "aifc": ("AIFF", "PCM_16", "LITTLE"),
    "aifc32": ("AIFF", "FLOAT", "FILE"), "ima4": ("AIFF", "IMA_ADPCM", "FILE"), "aifc-law": ("AIFF", "ULAW", "FILE"), "au": ("AU", "PCM_16", "FILE"),
    "au-law": ("AU", "ULAW", "FILE"), "dns": ("AU", "FLOAT", "LITTLE"), "w64": ("W64", "PCM_16", "FILE"), "w64-24": ("W64", "PCM_24", "FILE"), "sph": ("NIST", "PCM_16", "LITTLE"),
    "sph-big": ("NIST", "PCM_24", "BIG"), "sph-law": ("NIST", "ALAW", "FILE"),
}  # fmt: skip
kinds = st.sampled_from(sorted(KINDS))


@functools.cache
def encoded(kind: str, samples: int = 2000, channels: int = 1) -> bytes:
    container, subtype, endian = KINDS[kind]
    file = io.BytesIO()
    sound = np.random.default_rng(samples).normal(0, 0.1, (samples, channels))
    soundfile.write(file, sound, 8000, format=container, subtype=subtype, endian=endian)
    return file.getvalue()


def refused(data: bytes, pattern: str) -> None:
    with pytest.raises(AudioError, match=pattern) as caught:
        decode(data, "a", None, 60)
    assert str(caught.value).startswith("a: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_the_sound_is_what_libsndfile_reads(kind: str, channels: int, tmp_path: Path) -> None:
    for samples in (2000, 2001):
        data = encoded(kind, samples, channels)
        expected = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]
        found = read_audio(data, "a", None, 60)
        np.testing.assert_allclose(found.waveform, expected.mean(axis=1), atol=1e-7)
        assert (found.source_rate, found.source_channels, found.plain) == (8000, channels, False)
        path = tmp_path / "sound"
        path.write_bytes(b"ID3\4\0\0\0\0\0\4abcd" + data)  # a tag in front
        np.testing.assert_array_equal(np.concatenate([*read_blocks(path, "a", 8000, 0.1)]), found.waveform)
        assert measure(path, "a")[:2] == (len(expected) / 8000, 8000)


@settings(max_examples=100, deadline=None)
@given(kinds, st.integers(1, 2), st.data())
def test_cut_files_are_refused(kind: str, channels: int, data: st.DataObject) -> None:
    """(The last two bytes may be no more than padding.)"""
    whole = encoded(kind, 2001, 1 if kind == "ima4" else channels)
    refused(
        whole[: data.draw(st.integers(12, len(whole) - 3))],
        r"truncated|damaged|cannot be decoded|not audio|bytes follow",
    )


@settings(max_examples=60, deadline=None)
@given(kinds, st.binary(min_size=1, max_size=600).filter(lambda rest: rest.strip(b"\0")))
def test_what_follows_the_stated_sound_is_noticed(kind: str, rest: bytes) -> None:
    whole = encoded(kind, 2000)
    refused(whole + b"\xff" + rest, r"follow the sound that its header states|truncated")
    np.testing.assert_array_equal(
        decode(whole + bytes(len(rest)) + b"TAG" + bytes(125), "a", None, 60)[0], decode(whole, "a", None, 60)[0]
    )


@pytest.mark.parametrize("kind", ["aiff", "w64", "au", "sph"])
def test_joined_files_are_refused(kind: str) -> None:
    refused(encoded(kind) * 2, "several recordings are joined|follow the sound that its header states")


def test_headers_that_were_never_finished() -> None:
    data = bytearray(encoded("au"))
    data[8:12] = b"\xff" * 4  # a size that is not known: all that follows
    np.testing.assert_array_equal(decode(bytes(data), "a", None, 60)[0], decode(encoded("au"), "a", None, 60)[0])
    data[8:12] = bytes(4)
    refused(bytes(data), r"4000 bytes follow .*, or the header was never finished; write it anew: ffmpeg -i bad\.au ")
    aiff = bytearray(encoded("aiff"))
    at = aiff.find(b"COMM")
    aiff[at + 10 : at + 14] = bytes(4)
    refused(bytes(aiff), r"4000 bytes follow the sound that its header states, or the header was never finished")
    w64 = bytearray(encoded("w64"))
    at = w64.find(b"data")
    w64[at + 16 : at + 24] = struct.pack("<Q", 24)
    refused(bytes(w64), "follow the sound that its header states|truncated")


def test_codecs_that_are_not_read_are_named() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(500), 8000, format="AIFF", subtype="DWVW_16")
    refused(file.getvalue(), r"AIFF with 'DWVW' is not read here; convert it: ffmpeg -i bad\.aiff ")
    data = encoded("sph").replace(b"sample_coding -s3 pcm", b"sample_coding -s26 pcm,embedded-shorten-v2.00", 1)
    refused(data, r"packed by Shorten is not read here; unpack it: sph2pipe -f wav bad\.sph good\.wav")
    refused(encoded("sph").replace(b"sample_count", b"sample_xount"), "does not say how much sound follows")


def test_a_sphere_of_few_words() -> None:
    """As LDC's older discs have them."""
    samples = np.arange(-500, 500, dtype="<i2")
    head = f"NIST_1A\n   1024\nsample_count -i {len(samples)}\nsample_n_bytes -i 2\nchannel_count -i 1\nsample_byte_format -s2 01\nsample_rate -i 16000\nend_head\n"
    waveform, rate = decode(head.encode().ljust(1024) + samples.tobytes(), "a", None, 60)
    assert rate == 16000
    np.testing.assert_array_equal(waveform, samples / np.float32(32768))


@settings(max_examples=300, deadline=None)
@given(kinds, st.data())
def test_headers_of_any_bytes_are_read_or_refused(kind: str, data: st.DataObject) -> None:
    whole = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(8, 130))
        whole[at : at + 4] = data.draw(
            st.sampled_from([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"-123", b"\0\0\0\x08"])
        )
    try:
        decode(bytes(whole), "a", None, 60)
    except AudioError as error:
        assert "\n" not in str(error)
