"""Every container that is read, cut, joined, tagged, unfinished, and with too much behind it: the right sound, or one sentence."""

from __future__ import annotations

import functools
import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio.containers import examine, recognise
from asr_kd.audio.decode import decode, encode, read_audio, read_blocks, seconds_of
from asr_kd.audio.live import pipe_sound
from asr_kd.errors import AudioError

KINDS = {
    "wav": ("WAV", "PCM_16"), "wav24": ("WAV", "PCM_24"), "wav32": ("WAV", "PCM_32"), "wav8": ("WAV", "PCM_U8"), "float": ("WAV", "FLOAT"),
    "double": ("WAV", "DOUBLE"), "mulaw": ("WAV", "ULAW"), "alaw": ("WAV", "ALAW"), "wavex": ("WAVEX", "PCM_24"), "rf64": ("RF64", "PCM_16"),
    "flac": ("FLAC", "PCM_16"), "flac24": ("FLAC", "PCM_24"), "mp3": ("MP3", "MPEG_LAYER_III"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"),
    "adpcm": ("WAV", "IMA_ADPCM"), "msadpcm": ("WAV", "MS_ADPCM"), "gsm": ("WAV", "GSM610"),
}  # fmt: skip
BARE = [
    kind for kind in KINDS if KINDS[kind][0] in ("WAV", "WAVEX", "RF64") and kind not in ("adpcm", "msadpcm", "gsm")
]
RATE = 8000
kinds = st.sampled_from(sorted(KINDS))


@functools.cache
def sound(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    hum = 0.3 * np.sin(np.arange(samples) * (0.2 + 0.05 * seed))
    return hum[:, None] + rng.normal(0, 0.02, (samples, channels))


@functools.cache
def encoded(kind: str, samples: int = 4000, channels: int = 1, seed: int = 0) -> bytes:
    file = io.BytesIO()
    container, subtype = KINDS[kind]
    soundfile.write(file, sound(samples, channels, seed), RATE, format=container, subtype=subtype)
    return file.getvalue()


def heard(data: bytes) -> np.ndarray:
    return decode(data, "a", None, 60)[0]


def refused(data: bytes, pattern: str = "") -> None:
    with pytest.raises(AudioError, match=pattern) as caught:
        heard(data)
    sentence = str(caught.value)
    assert sentence.startswith("a: ") and "\n" not in sentence and not re.search(r"object at 0x|Error\b", sentence)


def id3v2(size: int) -> bytes:
    return (
        b"ID3\4\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + (b"TIT2 \xff\xfb\x90\x64" * size)[:size]
    )


def ape(size: int, header: bool) -> bytes:
    def frame(flags: int) -> bytes:
        return b"APETAGEX" + struct.pack("<IIII", 2000, size + 32, 1, flags) + bytes(8)

    return (frame(0xA0000000) if header else b"") + (b"Title\0" * size)[:size] + frame(0x80000000 if header else 0)


def lyrics(size: int) -> bytes:
    return b"LYRICSBEGIN" + b"x" * size + f"{size + 11:06d}".encode() + b"LYRICS200"


ID3V1 = b"TAG" + b"\xff" * 125
FRONT = [lambda n: id3v2(n), lambda n: ape(n, True), lambda n: id3v2(n) + id3v2(3), lambda n: id3v2(n) + ape(n, True)]
BACK = [
    lambda n: ID3V1, lambda n: ape(n, True), lambda n: ape(n, False), lambda n: lyrics(n) + ID3V1, lambda n: ape(n, True) + ID3V1,
    lambda n: b"TAG+" + bytes(223) + ID3V1, lambda n: bytes(n), lambda n: b"",
]  # fmt: skip


@pytest.mark.parametrize("kind", BARE)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_bare_samples_are_those_that_libsndfile_reads(kind: str, channels: int) -> None:
    data = encoded(kind, 3001, channels)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    np.testing.assert_array_equal(
        heard(data), expected.mean(axis=1, dtype=np.float32) if channels > 1 else expected[:, 0]
    )


@pytest.mark.parametrize(("kind", "bits"), [("wav", 12), ("wav24", 20), ("wav8", 7)])
def test_odd_widths_are_the_upper_bits_of_their_bytes(kind: str, bits: int) -> None:
    data = bytearray(encoded(kind))
    data[34:36] = struct.pack("<H", bits)
    np.testing.assert_array_equal(heard(bytes(data)), heard(encoded(kind)))


@pytest.mark.parametrize("kind", BARE)
def test_big_endian_wav(kind: str) -> None:
    if kind in ("rf64", "wavex"):
        return
    file = io.BytesIO()
    soundfile.write(file, sound(500), RATE, format="WAV", subtype=KINDS[kind][1], endian="BIG")
    assert file.getvalue()[:4] == b"RIFX"
    np.testing.assert_array_equal(heard(file.getvalue()), heard(encoded(kind, 500)))


@settings(max_examples=60, deadline=None)
@given(kinds, st.sampled_from(FRONT), st.sampled_from(BACK), st.integers(1, 500))
def test_tags_in_front_and_behind_change_nothing(kind: str, front: object, back: object, size: int) -> None:
    data = encoded(kind)
    np.testing.assert_array_equal(heard(front(size) + data + back(size)), heard(data))  # type: ignore[operator]
    np.testing.assert_array_equal(heard(data + back(size)), heard(data))  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(
    kinds,
    st.lists(
        st.tuples(st.integers(100, 4000), st.integers(0, 3), st.booleans(), st.booleans()), min_size=2, max_size=3
    ),
)
def test_joined_files_are_read_whole(kind: str, parts: list[tuple[int, int, bool, bool]]) -> None:
    whole, expected = b"", []
    for samples, seed, front, back in parts:
        one = encoded(kind, samples, 1, seed)
        whole += (id3v2(77) if front else b"") + one + (ID3V1 if back else b"")
        expected.append(heard(one))
    found = read_audio(whole, "a", None, 60)
    np.testing.assert_array_equal(found.waveform, np.concatenate(expected))
    assert not found.plain  # another reader would stop behind the first


@settings(max_examples=120, deadline=None)
@given(kinds, st.integers(1, 3), st.data())
def test_cut_files_are_refused(kind: str, channels: int, data: st.DataObject) -> None:
    """(The last byte may be no more than padding.)"""
    whole = encoded(kind, 4000, min(channels, 1 if kind == "gsm" else 2))
    refused(
        whole[: data.draw(st.integers(0, len(whole) - 2))],
        r"truncated|damaged|not audio|empty|zero length|cannot be decoded",
    )


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(BARE),
    st.integers(1, 2),
    st.sampled_from([0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFD8]),
    st.data(),
)
def test_an_unfinished_wav_header_is_read_to_the_end(
    kind: str, channels: int, stated: int, data: st.DataObject
) -> None:
    whole = bytearray(encoded(kind, 2000, channels))
    at = whole.find(b"data") + 8
    whole[at - 4 : at] = struct.pack("<I", stated)
    if kind == "rf64":
        whole[20:44] = bytes(24)
    step = (len(whole) - at) // 2000
    count = data.draw(st.integers(1, 2000))
    torn = bytes(whole[: at + count * step + data.draw(st.integers(0, step - 1))])
    found = read_audio(torn, "a", None, 60)
    np.testing.assert_array_equal(found.waveform, heard(encoded(kind, 2000, channels))[:count])
    assert not found.plain


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([kind for kind in BARE if kind != "rf64"]), st.integers(1, 1990))
def test_a_wav_that_states_less_than_it_holds_is_read_whole(kind: str, stated: int) -> None:
    whole = bytearray(encoded(kind, 2000))
    at = whole.find(b"data") + 8
    whole[at - 4 : at] = struct.pack("<I", stated * ((len(whole) - at) // 2000))
    np.testing.assert_array_equal(heard(bytes(whole)), heard(encoded(kind, 2000)))


CHUNKS = [
    b"LIST\4\0\0\0INFO", b"id3 \6\0\0\0abcdef", b"bext\3\0\0\0abc\0" + b"fact\4\0\0\0\1\0\0\0", b"Xyz1\5\0\0\0abcde\0", b"LIST\xff\0\0\0cut short",
    b"xmp_\2\0\0\0ab", b"\0",
]  # fmt: skip


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", ["wav", "wav8", "wav24", "adpcm"])
@pytest.mark.parametrize("samples", [1000, 1001])
def test_chunks_behind_the_sound_are_no_sound(chunks: bytes, kind: str, samples: int) -> None:
    data = encoded(kind, samples)
    found = read_audio(data + chunks, "a", None, 60)
    np.testing.assert_array_equal(found.waveform, heard(data))
    assert found.plain
    if len(chunks) % 2 == 0 and b"cut" not in chunks:
        np.testing.assert_array_equal(heard(data + chunks + data), np.tile(heard(data), 2))


def test_an_rf64_counts_beyond_32_bits() -> None:
    """Its length stands in another chunk; BW64 is the same under another name."""
    data = bytearray(encoded("rf64", 500))
    at = data.find(b"ds64")
    assert at == 12 and struct.unpack_from("<Q", data, at + 16) == (1000,)
    np.testing.assert_array_equal(heard(b"BW64" + bytes(data[4:])), heard(encoded("wav", 500)))
    data[at + 16 : at + 24] = struct.pack("<Q", 1 << 33)
    refused(
        bytes(data), r"truncated, its header says 8589934592 bytes of sound and 1000 are there; .*ffmpeg -i bad\.wav"
    )


def flac(total: int, samples: int = 20000) -> bytes:
    data = bytearray(encoded("flac", samples))
    data[21] = data[21] & 0xF0 | total >> 32
    data[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    return bytes(data)


@pytest.mark.parametrize("samples", [1, 15, 4096, 20000])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_flac_that_states_nothing_or_less_is_read_whole(samples: int, share: float) -> None:
    found = read_audio(flac(int(samples * share), samples), "a", None, 60)
    np.testing.assert_array_equal(found.waveform, heard(encoded("flac", samples)))
    assert not found.plain


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_flac_that_states_nothing_is_refused(data: st.DataObject) -> None:
    whole = flac(0)
    frames = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xf8"]
    at = data.draw(st.integers(frames[0] + 1, len(whole) - 1))
    if at not in frames:  # between two frames there is nothing to see
        refused(whole[:at], "truncated or damaged, it does not end with a whole FLAC frame; fetch .*ffmpeg -i bad.flac")


def test_a_flac_that_states_less_and_does_not_end_with_a_frame_is_refused() -> None:
    refused(flac(3000) + b"junk" * 9, "damaged, more FLAC frames follow than its header states")
    for data in (flac(3000), encoded("flac", 20000)):
        assert len(heard(data + bytes(30000))) == 20000  # padding


@pytest.mark.parametrize("total", [20001, 1 << 35])
def test_a_flac_that_states_more_is_refused(total: int) -> None:
    refused(flac(total), r"truncated, its header says \S+ s and 2\.500 s are there")


def mp3(samples: int = 16000, seed: int = 0) -> tuple[bytes, bytes]:
    """The frame that states the length, and those of the sound."""
    data = encoded("mp3", samples, 1, seed)
    at = data.index(data[:2], 4)
    assert b"Xing" in data[:at] or b"Info" in data[:at]
    return data[:at], data[at:]


def near(found: np.ndarray, expected: np.ndarray) -> None:
    """The same sound, but for the delay of encoder and decoder, which nothing states now."""
    assert 0 <= len(found) - len(expected) <= 2304
    lags = [np.dot(found[lag : lag + len(expected)], expected) for lag in range(len(found) - len(expected) + 1)]
    shifted = found[int(np.argmax(lags)) :][: len(expected)]
    assert np.corrcoef(shifted, expected)[0, 1] > 0.999


def test_an_mp3_that_states_nothing_or_less_is_read_whole() -> None:
    head, frames = mp3()
    expected = heard(head + frames)
    near(heard(frames), expected)
    at = max(head.find(b"Xing"), head.find(b"Info"))
    for count in (0, 3, 20):
        less = head[: at + 8] + struct.pack(">I", count) + head[at + 12 :]
        near(heard(less + frames), expected)
        assert not read_audio(less + frames, "a", None, 60).plain
    silent = head[: at + 4] + struct.pack(">I", 0) + head[at + 8 :]  # the frame is there and says nothing
    near(heard(silent + frames), expected)


def test_an_mp3_that_states_nothing_and_holds_nothing_is_refused() -> None:
    head, _ = mp3()
    at = max(head.find(b"Xing"), head.find(b"Info"))
    refused(head[: at + 4] + struct.pack(">I", 0) + head[at + 8 :], "holds no samples")


def test_mp3s_with_and_without_a_length_are_joined() -> None:
    first, second = mp3(16000), mp3(12000, 1)
    left, right = heard(first[0] + first[1]), heard(second[0] + second[1])
    found = heard(first[0] + first[1] + second[1])
    np.testing.assert_array_equal(found[: len(left)], left)
    near(found[len(left) :], right)
    found = heard(first[1] + second[0] + second[1])
    np.testing.assert_array_equal(found[-len(right) :], right)
    near(found[: -len(right)], left)
    stereo = encoded("mp3", 12000, 2)
    size = stereo.index(stereo[:2], 4)
    near(heard(first[1] + stereo[size:])[-len(heard(stereo)) - 1105 :], heard(stereo))  # neither states its length
    # of another rate: never half of it
    other = io.BytesIO()
    soundfile.write(other, sound(16000), 16000, format="MP3")
    refused(first[0] + first[1] + other.getvalue(), r"different sample rates were joined in it \(8000, 16000 Hz\)")


def test_an_mp3_that_begins_within_a_frame_is_refused() -> None:
    frames = mp3()[1]
    refused(frames[50:], r"damaged, \d+ bytes stand before its first MP3 frame; fetch .* ffmpeg -i bad\.mp3")


def test_mp3_behind_padding() -> None:
    head, frames = mp3()
    np.testing.assert_array_equal(heard(bytes(500) + head + frames), heard(head + frames))
    near(heard(bytes(500) + frames + bytes(700)), heard(head + frames))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["flac", "mp3", "ogg", "opus"]), st.binary(min_size=2, max_size=3000))
def test_too_much_behind_is_noticed_or_no_sound(kind: str, junk: bytes) -> None:
    data = encoded(kind)
    try:
        found = heard(data + junk)
    except AudioError as error:
        assert re.search(r"damaged at byte|bytes follow|truncated", str(error)) and "ffmpeg -i bad." in str(error)
    else:
        assert kind == "flac" or not junk.strip(b"\0")  # what is less than a frame is no lost sound
        np.testing.assert_array_equal(found, heard(data))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["wav", "wav24", "float"]), st.integers(1, 300))
def test_too_much_behind_a_wav_is_sound(kind: str, samples: int) -> None:
    data, more = encoded(kind), encoded(kind, samples, 1, 1)
    more = more[more.find(b"data") + 8 :][: samples * (int(KINDS[kind][1][-2:]) // 8 if kind != "float" else 4)]
    found = heard(data + more)
    assert len(found) == 4000 + samples
    np.testing.assert_array_equal(found[4000:], heard(encoded(kind, samples, 1, 1)))


@pytest.mark.parametrize(("kind", "what"), [("flac", "FLAC"), ("ogg", "Ogg"), ("mp3", "MP3")])
@pytest.mark.parametrize("tag", [b"", id3v2(40)])
def test_another_container_behind_a_wav_is_never_heard_as_samples(kind: str, what: str, tag: bytes) -> None:
    data = encoded("wav") + tag + encoded(kind)
    refused(data, f"a: {what} follows the sound of a WAV; write each recording to a file of its own")
    with pytest.raises(AudioError, match=f"pipe: {what} follows the sound of a WAV"):
        list(pipe_sound(io.BytesIO(data), "pipe", RATE, None, 0.1))


def test_a_wav_that_was_sent_as_text_is_refused() -> None:
    data = encoded("wav", 8000, 1, 1)
    assert data.count(b"\n") > 8
    refused(data.replace(b"\n", b"\r\n"), "sent as text .*fetch it again in binary mode")


def test_streams_beside_each_other_are_refused() -> None:
    first, second = encoded("ogg"), encoded("ogg", 4000, 1, 1)
    page = first.find(b"OggS", 4)
    other = second.find(b"OggS", 4)
    # the serial numbers differ or not: two beginnings come before the end of either
    refused(first[:page] + second[:other] + first[page:] + second[other:], "holds several streams beside each other")


OTHERS = {
    "CAF": b"caff\0\1\0\0desc", "AMR": b"#!AMR\n\x04",
    "AMR-WB": b"#!AMR-WB\n", "WMA": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "WebM": bytes.fromhex("1a45dfa39f428681"), "MP4": b"\0\0\0\x20ftypM4A ",
    "Monkey's Audio": b"MAC \x96\x0f", "WavPack": b"wvpk\0\0", "VOC": b"Creative Voice File\x1a", "AVI": b"RIFF\0\0\0\0AVI LIST",
    "AC-3": b"\x0b\x77\1\2", "AAC": b"\xff\xf1\x50\x80\x04\x1f\xfc" + bytes(25) + b"\xff\xf1\x50\x80\x04\x1f\xfc", "layer II": (b"\xff\xfd\x40\xc4" + bytes(204)) * 3,
    "IRCAM": bytes.fromhex("64a3040001"), "DSS": b"\2dss\0", "IFF": b"FORM\0\0\1\x0016SVVHDR", "RIFF without WAVE": b"RIFF\0\0\1\0QLCMfmt ", "PARIS": b" paf\0\0",
    "Shorten": b"ajkg\2", "MPEG transport stream": (b"\x47\x40" + bytes(186)) * 3,
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("front", [b"", id3v2(40)])
def test_what_is_not_read_is_named_with_the_command_that_converts_it(what: str, front: bytes) -> None:
    data = front + OTHERS[what] + bytes(300)
    refused(
        data,
        rf"{re.escape(what)}.* is not read here; give WAV, FLAC, MP3, Ogg Vorbis or Opus, e\.g\. by ffmpeg -i bad\.\w+ ",
    )
    with pytest.raises(AudioError) as caught:
        examine(data)
    assert not re.search("damaged|truncated", str(caught.value))


def test_codecs_in_wav_ogg_and_flac_are_named() -> None:
    for tag, what in {0x45: r"G\.726", 0x50: "MPEG layer", 0x161: "WMA", 0xFF: "AAC", 0x7777: "codec 0x7777"}.items():
        data = bytearray(encoded("wav"))
        data[20:22] = struct.pack("<H", tag)
        refused(bytes(data), rf"WAV with {what}.* of 16 bits is not read here; convert it: ffmpeg -i bad\.wav")
    for mark, what in {
        b"\x7fFLAC\1\0": "FLAC",
        b"Speex   1.2": "Speex",
        b"\x80theora\3\2": "Theora",
        b"nothing": "something unknown",
    }.items():
        page = bytearray(b"OggS\0\2" + bytes(16) + bytes(4) + bytes([1, len(mark)]) + mark)
        page[22:26] = struct.pack("<I", checksum(bytes(page)))
        refused(bytes(page), f"Ogg with {what}.* is not read here; convert it: ffmpeg -i bad.ogg")
    data = bytearray(encoded("flac"))
    data[20] |= 1  # more than 16 bits: 32
    data[21] |= 0xF0
    refused(bytes(data), "FLAC of 32 bits is not read here; convert it: ffmpeg")


def checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 1 << 31 else value << 1) & 0xFFFFFFFF
    return value


def test_mp3_in_a_wav() -> None:
    head, frames = mp3()
    body = b"WAVE" + b"fmt " + struct.pack("<IHHIIHHHHIHHH", 30, 0x55, 1, RATE, 4000, 1, 0, 12, 1, 2, 288, 1, 1393)
    body += b"data" + struct.pack("<I", len(frames)) + frames
    near(heard(b"RIFF" + struct.pack("<I", len(body)) + body), heard(head + frames))


NO_SOUND = {
    "gzip; unpack it first: gunzip": b"\x1f\x8b\x08\0abc", "zip archive": b"PK\3\4abc", "web page or XML": b"\n<!DOCTYPE html><p>404", "JSON": b'{"error": 1}',
    "picture": b"\x89PNG\r\n", "tar": b"a.wav".ljust(257, b"\0") + b"ustar\0", "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n", "but text": b"one two three\n" * 9,
    "NumPy": b"\x93NUMPY\1\0", "that can be read": bytes(range(1, 90)),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_SOUND)
def test_what_is_no_sound_is_named(what: str) -> None:
    refused(NO_SOUND[what], rf"not audio .*{what}")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.sampled_from([b"RIFF", b"fLaC", b"OggS", b"ID3\4\0\0", b"\xff\xfb", b"RF64"]).flatmap(lambda head: st.binary(max_size=60).map(lambda rest: head + rest)))  # fmt: skip
def test_any_bytes_are_something_or_one_sentence(data: bytes) -> None:
    recognise(data)
    try:
        found = heard(data)
    except AudioError as error:
        assert "\n" not in str(error) and str(error).startswith("a: ")
    else:
        assert len(found)


@settings(max_examples=40, deadline=None)
@given(kinds, st.sampled_from(FRONT), st.booleans(), st.sampled_from([0.05, 0.31, 9.0]))
def test_block_by_block_it_is_the_same(kind: str, front: object, twice: bool, seconds: float) -> None:
    data = front(100) + encoded(kind, 4000) * (2 if twice else 1)  # type: ignore[operator]
    path = Path(STORE) / "sound"
    path.write_bytes(data)
    expected = heard(data)
    found = np.concatenate(list(read_blocks(path, "a", RATE, seconds)))
    np.testing.assert_allclose(found, expected, atol=2e-4 if kind == "mp3" else 0)
    assert seconds_of(path, "a") == pytest.approx(len(expected) / RATE, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_libsndfile_never_calls_back_into_python(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's handler that raises within such a call is lost: Ctrl-C would not end the job."""
    data = encoded(kind)
    (Path(STORE) / "sound").write_bytes(id3v2(9) + data)
    (Path(STORE) / "plain").write_bytes(data)
    expected = heard(data)

    def refuse(*_: object) -> None:
        raise AssertionError("libsndfile was given a Python object to read or write")

    monkeypatch.setattr(soundfile.SoundFile, "_init_virtual_io", refuse)
    np.testing.assert_array_equal(heard(data), expected)
    for name in ("sound", "plain"):
        assert len(np.concatenate(list(read_blocks(Path(STORE) / name, "a", RATE)))) == len(expected)
        assert seconds_of(Path(STORE) / name, "a") > 0
    np.testing.assert_array_equal(heard(encode(expected, RATE, "WAV", "FLOAT")), expected)


STORE = ""


@pytest.fixture(autouse=True, scope="module")
def _store(tmp_path_factory: pytest.TempPathFactory) -> None:
    global STORE
    STORE = str(tmp_path_factory.mktemp("sounds"))


def antiphase(kind: str, share: float) -> bytes:
    left = sound(8000)[:, 0]
    noise = np.random.default_rng(9).normal(0, 0.003, 8000)
    file = io.BytesIO()
    soundfile.write(
        file, np.stack([left, noise - share * left], axis=1), RATE, format=KINDS[kind][0], subtype=KINDS[kind][1]
    )
    return file.getvalue()


@pytest.mark.parametrize("kind", ["wav", "float", "flac", "ogg"])
def test_channels_that_cancel_out_are_refused(kind: str) -> None:
    for share in (1.0, 0.9):
        refused(
            antiphase(kind, share), r"its 2 channels cancel out .* ffmpeg -i bad\.wav -af 'pan=mono\|c0=c0' good\.wav"
        )
    assert len(heard(antiphase(kind, 0.3))) == 8000
    path = Path(STORE) / "antiphase"
    path.write_bytes(antiphase(kind, 1.0))
    with pytest.raises(AudioError, match="cancel out"):
        list(read_blocks(path, "a", RATE))


@pytest.mark.parametrize("channels", [2, 3, 32])
def test_channels_that_only_differ_are_mixed(channels: int) -> None:
    rng = np.random.default_rng(0)
    for samples in (
        rng.normal(0, 0.1, (4000, channels)),  # nothing in common
        rng.normal(0, 0.1, (4000, 1)) * np.eye(1, channels),  # one alone is used
        np.zeros((4000, channels)) + 0.2 * (-1) ** np.arange(channels),  # offsets, and no sound
        rng.integers(-1, 2, (4000, 1)) / 32768 * (-1) ** np.arange(channels),  # silence, but for the last bit
    ):
        file = io.BytesIO()
        soundfile.write(file, samples, RATE, format="WAV", subtype="PCM_16")
        expected, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
        np.testing.assert_allclose(heard(file.getvalue()), expected.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("between", [b"", b"LIST\4\0\0\0INFO", b"fact\3\0\0\0\1\0\0\0JUNK\0\0\0\0"])
@pytest.mark.parametrize("kind", ["wav", "wav24", "wav8", "float"])
def test_a_sound_in_several_chunks_is_heard_whole(kind: str, between: bytes) -> None:
    whole = encoded(kind, 1001)
    at = whole.index(b"data") + 8
    width = (len(whole) - at) // 1001
    cuts = [whole[at + first * width : at + last * width] for first, last in ((0, 301), (301, 302), (302, 1001))]
    chunks = [b"data" + struct.pack("<I", len(cut)) + cut + b"\0" * (len(cut) % 2) for cut in cuts]
    data = whole[: at - 8] + between.join(chunks)
    data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    np.testing.assert_array_equal(heard(data), heard(whole))
    refused(data[:-40], "truncated, its header says")  # each chunk counts
