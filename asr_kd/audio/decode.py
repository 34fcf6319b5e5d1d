"""Bytes → mono waveform at the wanted rate; every kind of bad file becomes one clear error."""

from __future__ import annotations

import io

import numpy as np
import soundfile
import soxr

from asr_kd.errors import AudioError


def decode(data: bytes, name: str, sample_rate: int | None, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode an audio file (WAV, FLAC, MP3, Ogg Vorbis, Opus).

    Args:
        data: the file's bytes.
        name: opens every message.
        sample_rate: rate in Hz to convert to; None keeps the file's own.
        max_seconds: longer audio is refused before it is decoded.

    Returns:
        float32 [samples], all channels averaged, and its rate in Hz.

    Raises:
        AudioError: when the audio is empty, not audio, truncated, of zero length, not finite or too long.
    """
    if not data:
        raise AudioError(f"{name}: the file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, rate = file.frames, file.samplerate
            if rate < 1000 or rate > 768000:
                raise AudioError(f"{name}: a sample rate of {rate} Hz is not plausible")
            # a damaged header may promise any length: what is allocated is bounded here
            limit = int(max_seconds * rate) + 1
            if promised > limit and file.format != "MP3":
                raise AudioError(f"{name}: {promised / rate:,.1f} s of audio, more than max_seconds {max_seconds:g}")
            samples = file.read(frames=limit, dtype="float32", always_2d=True)
            more = len(samples) == limit
    except (soundfile.LibsndfileError, RuntimeError, ValueError, MemoryError) as error:
        raise AudioError(f"{name}: not readable as audio ({str(error).rstrip('.')})") from None
    if more:
        raise AudioError(f"{name}: more audio than max_seconds {max_seconds:g}")
    if len(samples) == 0:
        raise AudioError(f"{name}: holds no sound (zero length)")
    if len(samples) < promised or _cut_short(data):
        raise AudioError(f"{name}: truncated: the header promises more audio than the file holds")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds samples that are not numbers (NaN or infinite)")
    waveform = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if sample_rate is not None and sample_rate != rate:
        waveform, rate = soxr.resample(waveform, rate, sample_rate), sample_rate
    return np.ascontiguousarray(waveform, dtype=np.float32), rate


def _cut_short(data: bytes) -> bool:
    """Whether a WAV file's data chunk is longer than the file: libsndfile reads what is there without a word."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return False
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"data":
            # 0xFFFFFFFF and 0 stand for "unknown" in streams that were written without a seek
            return size not in (0, 0xFFFFFFFF) and at + 8 + size > len(data)
        at += 8 + size + size % 2
    return False
