"""Bytes of an audio file → mono waveform at the wanted rate; every kind of bad file becomes one clear sentence."""

from __future__ import annotations

import io
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soundfile
import soxr

from asr_kd.errors import AudioError

EXTENSIONS = ("wav", "flac", "ogg", "opus", "mp3")
RATES = range(1000, 768001)  # Hz; what lies outside is a damaged header
MAX_CHANNELS = 32
MAX_AMPLITUDE = 100.0  # full scale is 1; far beyond it are integers that were stored as floats, or noise
Buffer = bytes | mmap.mmap

UNKNOWN_LENGTH = 1 << 48  # libsndfile says something this large when a stream does not state its length
STREAMED_WAV = 0x7FFFF000  # writers to a pipe put this or more where the length belongs
MP3_SLACK = 2304  # samples of encoder and decoder delay that an MP3's stated length may be off by


@dataclass
class Audio:
    """Decoded audio: waveform float32 [samples], mono, at `rate` Hz, and what the file held before conversion."""

    waveform: np.ndarray
    rate: int
    extension: str
    source_rate: int
    source_channels: int


def decode(data: bytes, name: str, sample_rate: int | None, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode a WAV, FLAC, MP3, Ogg Vorbis or Opus file of any rate and number of channels.

    Args:
        data: the bytes of the file.
        name: opens every message.
        sample_rate: wanted rate in Hz; None keeps the file's own.
        max_seconds: longer audio is refused before it is decoded.

    Returns:
        waveform float32 [samples], mono (the mean of the channels), full scale 1; and its rate in Hz.

    Raises:
        AudioError: when the audio is empty, not audio, truncated, damaged, too long, or not a number.
    """
    audio = read_audio(data, name, sample_rate, max_seconds)
    return audio.waveform, audio.rate


def read_audio(data: bytes, name: str, sample_rate: int | None, max_seconds: float) -> Audio:
    """Like `decode`, and says what the file held."""
    _check_not_empty(len(data), name)
    with _reasons(name), soundfile.SoundFile(io.BytesIO(data)) as file:
        extension, length = _check_header(file, data, name)
        rate, channels = file.samplerate, file.channels
        if length > int(max_seconds * rate):
            raise AudioError(
                f"{name}: {length / rate:.1f} s, longer than max_seconds {max_seconds:g}; cut it or raise max_seconds"
            )
        # one read: libsndfile's lossy decoders do not promise the same samples after a seek
        samples = file.read(dtype="float32", always_2d=True)
    _check_length(len(samples), length, rate, extension, name)
    waveform = _mono(samples, name)
    wanted = sample_rate or rate
    if wanted != rate:
        waveform = soxr.resample(np.ascontiguousarray(waveform), rate, wanted)
        if not len(waveform):
            raise AudioError(f"{name}: too short to be converted to {wanted} Hz ({len(samples)} samples); leave it out")
    return Audio(np.ascontiguousarray(waveform, dtype=np.float32), wanted, extension, rate, channels)


def read_blocks(path: Path, name: str, sample_rate: int, seconds: float = 10.0) -> Iterator[np.ndarray]:
    """The same waveform as `decode` gives, block by block, of a local file of any length; memory holds one block.

    An MP3 may differ from it by a rounding: its decoder does not promise the same samples for reads of another size.

    Args:
        seconds: length of a block, of the file's own rate.

    Returns:
        blocks float32 [samples], mono, at `sample_rate`.

    Raises:
        AudioError: as `decode`, at the block where it is found.
    """
    with _opened(path, name) as raw, _reasons(name), soundfile.SoundFile(raw) as file:
        with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:  # given back at once, with its memory
            extension, length = _check_header(file, data, name)
        rate, found = file.samplerate, 0
        resample = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32") if rate != sample_rate else None
        while len(samples := file.read(max(1, int(seconds * rate)), dtype="float32", always_2d=True)):
            found += len(samples)
            waveform = _mono(samples, name)
            yield resample.resample_chunk(waveform) if resample else waveform
        _check_length(found, length, rate, extension, name)
        if resample:
            yield resample.resample_chunk(np.empty(0, np.float32), last=True)


def seconds_of(path: Path, name: str) -> float:
    """How long a local audio file is by its header.

    Raises:
        AudioError: when it is not audio.
    """
    with _opened(path, name) as raw, _reasons(name), soundfile.SoundFile(raw) as file:
        return file.frames / max(1, file.samplerate)


def _opened(path: Path, name: str) -> IO[bytes]:
    """A file that holds something, opened so that soundfile cannot read a format from its name (`.raw` is one)."""
    _check_not_empty(path.stat().st_size, name)
    return os.fdopen(os.open(path, os.O_RDONLY), "rb")


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """What libsndfile says, as one sentence."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: {_reason(error)}") from None
    except (soundfile.SoundFileError, ValueError, OverflowError, MemoryError) as error:
        raise AudioError(f"{name}: cannot be decoded ({error or 'out of memory'}); make the file again") from None


def _check_not_empty(size: int, name: str) -> None:
    if not size:
        raise AudioError(f"{name}: empty (0 bytes); fetch the file again")


def _check_header(file: soundfile.SoundFile, data: Buffer, name: str) -> tuple[str, int]:
    """The kind of file and its length in samples, once both can be believed."""
    extension = _extension(file, name)
    rate, channels, length = file.samplerate, file.channels, file.frames
    if rate not in RATES or not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{name}: its header says {rate} Hz and {channels} channels; it is damaged, make it again")
    _check_container(data, name, extension, length)
    if length >= UNKNOWN_LENGTH:
        raise AudioError(
            f"{name}: does not state its length (it was written to a pipe); write it to a file with ffmpeg or flac"
        )
    return extension, length


def _check_length(found: int, length: int, rate: int, extension: str, name: str) -> None:
    if found < length - (MP3_SLACK if extension == "mp3" else 0):
        raise AudioError(
            f"{name}: truncated or damaged, its header says {length / rate:.3f} s and {found / rate:.3f} s could "
            "be decoded; fetch the file again"
        )
    if not found:
        raise AudioError(f"{name}: holds no samples (zero length); leave it out")


def _mono(samples: np.ndarray, name: str) -> np.ndarray:
    """The mean of the channels of float32 [samples, channels], once they are numbers of a sensible size."""
    peak = max(float(samples.max(initial=0.0)), -float(samples.min(initial=0.0)))  # both are NaN where a sample is
    if not np.isfinite(peak):
        raise AudioError(f"{name}: holds samples that are not numbers (NaN or infinite); make the file again")
    if peak > MAX_AMPLITUDE:
        raise AudioError(
            f"{name}: its samples reach {peak:.3g} where full scale is 1; scale them and write the file again"
        )
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


def _reason(error: soundfile.LibsndfileError) -> str:
    text = error.error_string.strip().rstrip(".")
    if "not recognised" in text or "does not exist" in text:
        return "not audio that can be read; give WAV, FLAC, MP3, Ogg Vorbis or Opus"
    return f"truncated or damaged ({text.removeprefix('Error : ')}); fetch the file again"


def _extension(file: soundfile.SoundFile, name: str) -> str:
    if file.format in ("WAV", "WAVEX", "RF64"):
        return "wav"
    if file.format == "OGG" and file.subtype in ("VORBIS", "OPUS"):
        return "opus" if file.subtype == "OPUS" else "ogg"
    if file.format in ("FLAC", "MP3"):
        return file.format.lower()
    raise AudioError(f"{name}: {file.format} {file.subtype} is not read here; give WAV, FLAC, MP3, Ogg Vorbis or Opus")


def _check_container(data: Buffer, name: str, extension: str, length: int) -> None:
    """Find what libsndfile passes over in silence: it shortens a cut file, and skips damaged pages."""
    problem = None
    if extension == "wav":
        problem = _wav_problem(data)
    elif extension in ("ogg", "opus"):
        problem = _ogg_problem(data)
    elif extension == "mp3":
        problem = _mp3_problem(data, length)
    if problem:
        raise AudioError(f"{name}: {problem}")


def _wav_problem(data: Buffer) -> str | None:
    order = ">" if data[:4] == b"RIFX" else "<"
    at = 12
    while at + 8 <= len(data):
        size = struct.unpack_from(order + "I", data, at + 4)[0]
        at += 8
        if data[at - 8 : at - 4] == b"data":
            if len(data) - at < size < STREAMED_WAV:
                return f"truncated, its header says {size} bytes of sound and {len(data) - at} are there; fetch the file again"
            return None
        at += size + size % 2
    return "truncated, it ends before its sound; fetch the file again"


_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    # Ogg's CRC is zlib's with every bit order reversed, start 0 and no final inversion
    value = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def _ogg_problem(data: Buffer) -> str | None:
    at, last = 0, 0
    while at < len(data) and not last & 4:
        if data[at : at + 4] != b"OggS"[: len(data) - at]:
            return f"damaged at byte {at} (no Ogg page begins there); fetch the file again"
        body = at + 27 + data[at + 26] if at + 27 <= len(data) else len(data) + 1
        end = body + sum(data[at + 27 : body])
        if end > len(data):
            return f"truncated, its last Ogg page needs {end - at} bytes and {len(data) - at} are there; fetch the file again"
        page = data[at : at + 22] + bytes(4) + data[at + 26 : end]
        if _ogg_checksum(page) != struct.unpack_from("<I", data, at + 22)[0]:
            return f"damaged at byte {at} (an Ogg page differs from its checksum); fetch the file again"
        last = data[at + 5]
        if last & 2 and at:
            return "holds several Ogg streams; write each to a file of its own"
        at = end
    if not last & 4:
        return "truncated, it ends before its last Ogg page; fetch the file again"
    if data.find(b"OggS", at) >= 0:
        return "holds several Ogg streams; write each to a file of its own"
    return None


_MP3_KBPS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _mp3_frame(data: Buffer, at: int) -> tuple[int, int] | None:
    """Bytes and samples of the layer III frame that begins at `at`, or None when none does."""
    if at + 4 > len(data):
        return None
    header = struct.unpack_from(">I", data, at)[0]
    version, layer, kbps, rate = header >> 19 & 3, header >> 17 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or kbps in (0, 15) or rate == 3:
        return None
    first = version == 3  # MPEG 1; else 2 or 2.5
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if first else 72) * 1000 * _MP3_KBPS[3 if first else 2][kbps] // hertz + (
        header >> 9 & 1
    ), 1152 if first else 576


def _mp3_problem(data: Buffer, length: int) -> str | None:
    at = 0
    while data[at : at + 3] == b"ID3" and at + 10 <= len(data):
        at += 10 + sum(
            (byte & 127) << shift for byte, shift in zip(data[at + 6 : at + 10], (21, 14, 7, 0), strict=True)
        )
    first, frames, samples = at, 0, 0
    while frame := _mp3_frame(data, at):
        at += frame[0]
        frames += 1
        samples += frame[1]
    if at > len(data):
        return f"truncated, its last MP3 frame lacks {at - len(data)} bytes; fetch the file again"
    head = data[first : first + 200]
    tag = max(head.find(b"Xing"), head.find(b"Info"))
    if tag >= 0 and len(head) >= tag + 16:
        flags, stated_frames, stated_bytes = struct.unpack_from(">III", head, tag + 4)
        # cut between two frames; both must be less, for encoders differ in what they count
        if flags & 3 == 3 and frames - 1 < stated_frames and len(data) - first < stated_bytes:
            return f"truncated, it states {stated_frames} MP3 frames and {frames - 1} are there; fetch the file again"
    stated = tag >= 0 or b"VBRI" in head
    # without a stated length libsndfile guesses one from the first frame, and stops there
    if not stated and samples - length > MP3_SLACK:
        return "an MP3 of varying bit rate that does not state its length; convert it to FLAC"
    return None
