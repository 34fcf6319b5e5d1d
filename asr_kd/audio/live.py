"""Sound as it arrives: raw PCM or WAV through a pipe, or a microphone."""

from __future__ import annotations

import queue
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import soxr

from asr_kd.audio.decode import STREAMED_WAV
from asr_kd.errors import AudioError, UserError

# WAV's format tag and bits a sample → how numpy reads it, and what full scale is; 24 bits are widened to 32
ENCODINGS = {
    (1, 16): ("<i2", 2.0**15), (1, 24): ("<i4", 2.0**31), (1, 32): ("<i4", 2.0**31), (3, 32): ("<f4", 1.0), (3, 64): ("<f8", 1.0),
}  # fmt: skip
EXTENSIBLE = 0xFFFE


@dataclass
class Format:
    """How the sound in a pipe is written."""

    rate: int
    channels: int = 1
    kind: tuple[int, int] = (1, 16)
    bytes: int | None = None  # of the sound; None where the writer could not know


def pipe_sound(stream: IO[bytes], name: str, sample_rate: int, raw_rate: int, seconds: float) -> Iterator[np.ndarray]:
    """Sound from a pipe, without waiting for more than has come: WAV, or raw 16-bit little-endian mono at `raw_rate`.

    Args:
        stream: a buffered binary stream (`read1`).
        sample_rate: wanted rate in Hz.
        seconds: length of a piece at most.

    Returns:
        pieces float32 [samples], mono, full scale 1, at `sample_rate`.

    Raises:
        AudioError: when it is neither (FLAC, MP3, Ogg; WAV of another encoding), is cut within a sample, or is no number.
    """
    head = stream.read(12)
    if head[:4] in (b"fLaC", b"OggS", b"RIFX") or head[:3] == b"ID3" or head[:2] in (b"\xff\xfb", b"\xff\xf3"):
        raise AudioError(
            f"{name}: neither raw PCM nor WAV; convert it, e.g. ffmpeg -i FILE -f s16le -ac 1 -ar {raw_rate} -"
        )
    wav = head[:4] == b"RIFF" and head[8:] == b"WAVE"
    found = _wav_format(stream, name) if wav else Format(raw_rate)
    resample = soxr.ResampleStream(found.rate, sample_rate, 1, dtype="float32") if found.rate != sample_rate else None
    size = found.channels * found.kind[1] // 8  # bytes of a sample of all channels
    piece = max(1, int(seconds * found.rate)) * size
    read = getattr(stream, "read1", stream.read)
    left, waiting = found.bytes, b"" if wav else head
    while data := waiting[:0] if left == 0 else read(piece if left is None else min(left, piece)):
        left = None if left is None else left - len(data)
        data = waiting + data
        waiting = data[len(data) - len(data) % size :]
        waveform = _waveform(data[: len(data) - len(waiting)], found, name)
        yield resample.resample_chunk(waveform) if resample else waveform
    if wav and (waiting or left):
        raise AudioError(f"{name}: ends before the length that its WAV header states; send the whole file")
    if len(waiting) % size:
        raise AudioError(f"{name}: ends within a sample; raw sound must be 16-bit mono")
    last = _waveform(waiting, found, name)  # raw sound that is shorter than a header
    yield resample.resample_chunk(last, last=True) if resample else last


def _waveform(data: bytes, found: Format, name: str) -> np.ndarray:
    dtype, scale = ENCODINGS[found.kind]
    if found.kind[1] == 24:  # the three bytes are the upper ones of four
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data = padded.tobytes()
    samples = np.frombuffer(data, dtype).astype(np.float64) / scale
    waveform = samples.reshape(-1, found.channels).mean(axis=1).astype(np.float32)
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name}: holds samples that are not numbers; it is not what its format says")
    return waveform


def _wav_format(stream: IO[bytes], name: str) -> Format:
    """Read a WAV header up to its sound."""
    found, size = None, 0
    while len(header := stream.read(8)) == 8:
        size = struct.unpack("<I", header[4:])[0]
        if header[:4] == b"data":
            break
        body = stream.read(size + size % 2)
        if header[:4] == b"fmt " and len(body) >= 16:
            tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
            if tag == EXTENSIBLE and len(body) >= 26:
                tag = struct.unpack_from("<H", body, 24)[0]
            found = Format(rate, channels, (tag, bits))
    else:
        raise AudioError(f"{name}: a WAV header without sound behind it; send the whole file")
    if found is None or not 1000 <= found.rate <= 768000 or not 1 <= found.channels <= 32:
        raise AudioError(f"{name}: its WAV header is damaged; make it again")
    if found.kind not in ENCODINGS:
        raise AudioError(f"{name}: WAV of encoding {found.kind[0]} with {found.kind[1]} bits; send 16-bit PCM")
    if 0 < size < STREAMED_WAV:
        found.bytes = size
    return found


def microphone_sound(sample_rate: int, seconds: float) -> Iterator[np.ndarray]:
    """What the default microphone hears, in pieces float32 [samples] of so many seconds, until interrupted.

    Raises:
        UserError: when the extra is not installed, or the machine has no microphone at that rate.
    """
    try:
        import sounddevice
    except ImportError:
        raise UserError("microphone: needs the extra mic; install it with pip install 'asr-kd[mic]'") from None
    except OSError:
        raise UserError("microphone: the library PortAudio is missing; install it (Debian: libportaudio2)") from None
    heard: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

    def hear(samples: np.ndarray, frames: int, time: Any, status: Any) -> None:
        heard.put(samples[:, 0].copy())

    try:
        with sounddevice.InputStream(
            sample_rate, blocksize=int(seconds * sample_rate), channels=1, dtype="float32", callback=hear
        ):
            while True:
                yield heard.get()
    except KeyboardInterrupt:
        return
    except sounddevice.PortAudioError as error:
        raise UserError(
            f"microphone: cannot be opened at {sample_rate} Hz ({error}); connect one, or pipe sound in and give -"
        ) from None
