"""Bytes of an audio file → mono waveform at the wanted rate; for every kind of bad file a clear one-sentence error."""

from __future__ import annotations

import io
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from asr_kd.audio import wav
from asr_kd.audio.containers import examine
from asr_kd.audio.parts import GAP, Container, Part, convert, named
from asr_kd.audio.waveform import converted, mixed, streamed
from asr_kd.errors import AudioError
from asr_kd.files import clear_errors

#: kinds of files that shards hold; the others that are read become FLAC
EXTENSIONS = ("wav", "flac", "ogg", "opus", "mp3")
MP3_SLACK = 2304  # samples by which an MP3's stated length may be wrong, due to encoder and decoder delay
BLOCK_SLACK = 4096  # most samples after the end of the sound in the last block of a codec in WAV
IN_MEMORY = 1 << 26  # bytes; a larger part of a file is copied to a temporary file on disk for libsndfile


@dataclass
class Audio:
    """Decoded audio.

    Attributes:
        waveform: float32 [samples], mono, full scale 1.
        rate: of the waveform, Hz.
        extension: kind of the file.
        source_rate: of the file, Hz.
        source_channels: of the file.
        plain: whether any other reader finds the same sound in the file.
    """

    waveform: np.ndarray
    rate: int
    extension: str
    source_rate: int
    source_channels: int
    plain: bool


def decode(data: bytes, name: str, sample_rate: int | None, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode a WAV, FLAC, MP3, Ogg Vorbis, Opus, AIFF, AU, Wave64 or SPHERE file of any rate and number of channels.

    Concatenated files are read completely, and so is the sound after a header that was never finished.

    Args:
        data: the bytes of the file.
        name: of the file, for messages.
        sample_rate: wanted rate in Hz; None keeps the file's own.
        max_seconds: longer audio is refused before it is decoded.

    Returns:
        waveform float32 [samples], mono (the mean of the channels), full scale 1; and its rate in Hz.

    Raises:
        AudioError: when the file is empty, not audio, truncated, damaged or too long, a sample is not a number, or its
            channels cancel out.
    """
    audio = read_audio(data, name, sample_rate, max_seconds)
    return audio.waveform, audio.rate


def read_audio(data: bytes, name: str, sample_rate: int | None, max_seconds: float) -> Audio:
    """As `decode`, with what the file was before conversion.

    Args: see `decode`.

    Raises:
        AudioError: as `decode`.
    """
    with named(name):
        if not isinstance(data, bytes | bytearray | memoryview | mmap.mmap):
            raise AudioError(
                f"the bytes of an audio file are decoded, not {type(data).__name__}; asr_kd.audio.waveform.from_array takes samples"
            )
        data = bytes(data)
        container = examine(data)
        source = _Source(name, container, lambda start, end: data[start:end], None, len(data))
        with ExitStack() as stack:
            opened = [stack.enter_context(_open(part, source)) for part in container.parts]
            rate, length = _one_rate(opened), sum(one.length for one in opened)
            if length > int(max_seconds * rate):
                raise AudioError(
                    f"{length / rate:.1f} s, longer than max_seconds {max_seconds:g}; cut it or raise max_seconds"
                )

            def pieces() -> Iterator[np.ndarray]:
                for one in opened:  # each in one read: libsndfile's lossy decoders may give other samples after a seek
                    samples = one.read(one.length)
                    _check_length(len(samples), one, container)
                    yield samples

            waveform = mixed(pieces())
        waveform = converted(waveform, rate, sample_rate or rate)
    channels = max(one.channels for one in opened)
    return Audio(waveform, sample_rate or rate, container.extension, rate, channels, container.plain)


def read_blocks(path: Path, name: str, sample_rate: int, seconds: float = 10.0) -> Iterator[np.ndarray]:
    """The waveform that `decode` gives, block by block, of a local file of any length; memory holds one block.

    An MP3 may differ from it by rounding: its decoder may give other samples for reads of another size.

    Args:
        name: of the file, for messages.
        sample_rate: wanted rate in Hz.
        seconds: length of a block.

    Returns:
        blocks float32 [samples], mono, at `sample_rate`.

    Raises:
        AudioError: as `decode`, at the block with the error.
    """
    return streamed(native_blocks(path, name, seconds), sample_rate, name)


def native_blocks(path: Path, name: str, seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    """Rate in Hz and float32 [samples, channels] of a local file, block by block, as `decode` reads them, not yet checked."""
    with _opened(path, name) as source:
        rate = found = 0
        for part in source.container.parts:
            with _open(part, source) as one:
                rate = _one_rate([one], rate)
                here = 0
                while len(samples := one.read(min(max(1, int(seconds * rate)), one.length - here))):
                    here += len(samples)
                    yield rate, samples
                _check_length(here, one, source.container)
                found += here
        if not found:
            raise AudioError("holds no samples (zero length); leave it out")


def seconds_of(path: Path, name: str) -> float:
    """Length in seconds of a local audio file; as `measure`."""
    return measure(path, name)[0]


def measure(path: Path, name: str) -> tuple[float, int, str]:
    """Length in seconds, rate in Hz and kind (its usual extension) of a local file, not decoded; AudioError as `decode`."""
    with _opened(path, name) as source:
        return *_measured(source), source.container.extension


def length_of(data: bytes, name: str) -> float:
    """Length in seconds of an audio file's bytes, not decoded; AudioError as `decode`."""
    with named(name):
        return _measured(_Source(name, examine(data), lambda start, end: data[start:end], None, len(data)))[0]


def _measured(source: _Source) -> tuple[float, int]:
    """Length in seconds and rate in Hz."""
    total, rate = 0, 0
    for part in source.container.parts:
        with _open(part, source) as one:
            rate = _one_rate([one], rate)
            total += one.length
    return total / max(rate, 1), rate


@dataclass
class _Source:
    """A file: `fetch` gives its bytes from a start to an end; `file`: its handle, if it is local; `size` in bytes."""

    name: str
    container: Container
    fetch: Callable[[int, int], bytes]
    file: int | None
    size: int


@dataclass
class _Sound:
    """An opened part of a file: `read` gives the next samples, float32 [samples, channels]; `length`: stated samples."""

    rate: int
    channels: int
    length: int
    read: Callable[[int], np.ndarray]


@contextmanager
def _opened(path: Path, name: str) -> Iterator[_Source]:
    """Open a local file and examine it."""
    with named(name), open(path, "rb", buffering=0) as raw:
        file = raw.fileno()
        size = os.fstat(file).st_size
        # an empty file cannot be mapped; a mapped one is closed at once, to free its memory
        with mmap.mmap(file, 0, access=mmap.ACCESS_READ) if size else nullcontext(b"") as data:
            container = examine(data)
        yield _Source(name, container, lambda start, end: os.pread(file, end - start, start), file, size)


@contextmanager
def _open(part: Part, source: _Source) -> Iterator[_Sound]:
    if pcm := part.pcm:
        at = part.start

        def read(count: int) -> np.ndarray:
            nonlocal at
            begin, at = at, min(at + count * pcm.step, part.end)
            return wav.samples(source.fetch(begin, at), pcm)

        yield _Sound(pcm.rate, pcm.channels, (part.end - at) // pcm.step, read)
        return
    with ExitStack() as stack:
        if source.file is not None and not part.head and (part.start, part.end) == (0, source.size):
            handle = source.file
        else:
            handle = stack.enter_context(unnamed_file(part.end - part.start)).fileno()
            with clear_errors(Path(source.name)):  # `ulimit -f` also limits files in memory
                _write(handle, part.head)
                for at in range(part.start, part.end, GAP):
                    _write(handle, source.fetch(at, min(at + GAP, part.end)))
        os.lseek(handle, 0, os.SEEK_SET)
        stack.enter_context(_reasons(source.container.extension))
        # libsndfile reads from a handle itself: a signal during a call back into Python would be lost
        file = stack.enter_context(soundfile.SoundFile(handle, closefd=False))
        rate, channels, length = file.samplerate, file.channels, file.frames
        if rate not in wav.RATES or not 1 <= channels <= wav.MAX_CHANNELS:
            raise AudioError(f"its header says {rate} Hz and {channels} channels; it is damaged, make it again")
        if part.samples and 0 <= length - part.samples < BLOCK_SLACK:
            length = part.samples
        yield _Sound(rate, channels, length, lambda count: file.read(count, dtype="float32", always_2d=True))


def unnamed_file(size: int) -> IO[bytes]:
    """A temporary file for libsndfile, in memory if it is small."""
    if size <= IN_MEMORY and hasattr(os, "memfd_create"):  # Linux
        with suppress(OSError):
            return os.fdopen(os.memfd_create("sound"), "w+b")
    return tempfile.TemporaryFile()


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def encode(waveform: np.ndarray, rate: int, container: str, subtype: str | None = None) -> bytes:
    """The bytes of an audio file.

    Args:
        waveform: [samples].
        rate: Hz.
        container: a format of soundfile, such as WAV.
        subtype: an encoding of soundfile; None: the format's default.
    """
    with unnamed_file(waveform.nbytes) as file:
        soundfile.write(file.fileno(), waveform, rate, format=container, subtype=subtype, closefd=False)
        file.seek(0)
        return file.read()


def to_flac(waveform: np.ndarray, rate: int) -> bytes:
    """A waveform [samples] as FLAC with 16 bits; one that goes beyond full scale is turned down, not clipped."""
    peak = max(float(np.abs(waveform).max()), 1.0)
    samples = np.clip(np.rint(waveform.astype(np.float64) / peak * 32768), -32768, 32767).astype(np.int16)
    return encode(samples, rate, "FLAC", "PCM_16")


#: encodings of WAV whose samples FLAC holds as they are, and what it calls them
LOSSLESS = {"PCM_U8": "PCM_S8", "PCM_16": "PCM_16", "PCM_24": "PCM_24"}


def wav_as_flac(data: bytes) -> bytes | None:
    """A WAV file as FLAC with the same samples; None where FLAC holds none such (32 bits, floating point, µ-law, …)."""
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        if (subtype := LOSSLESS.get(sound.subtype)) is None:
            return None
        return encode(sound.read(dtype="int32"), sound.samplerate, "FLAC", subtype)


@contextmanager
def _reasons(extension: str) -> Iterator[None]:
    """Turn errors of libsndfile into AudioError."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        text = error.error_string.strip().rstrip(".").removeprefix("Error : ")
        if "unsupported encoding" in text or "unimplemented" in text:
            raise AudioError(f"its encoding is not read here; convert it: {convert(extension)}") from None
        raise AudioError(f"truncated or damaged ({text}); fetch the file again") from None
    except (soundfile.SoundFileError, ValueError, OverflowError, MemoryError) as error:
        raise AudioError(f"cannot be decoded ({error or 'out of memory'}); make the file again") from None


def _one_rate(opened: list[_Sound], rate: int = 0) -> int:
    rates = {one.rate for one in opened} | ({rate} if rate else set())
    if len(rates) > 1:
        raise AudioError(
            f"recordings of different sample rates were joined in it ({', '.join(map(str, sorted(rates)))} Hz); write each to a "
            "file of its own"
        )
    return rates.pop() if rates else 1


def _check_length(found: int, one: _Sound, container: Container) -> None:
    if found < one.length - (MP3_SLACK if container.extension == "mp3" else 0):
        raise AudioError(
            f"truncated or damaged, its header says {one.length / one.rate:.3f} s and {found / one.rate:.3f} s could "
            "be decoded; fetch the file again"
        )
