"""A recording of any length, from which segments are cut in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from asr_kd.audio.decode import MP3_SLACK, measure, native_blocks
from asr_kd.audio.parts import named
from asr_kd.audio.waveform import converted, mixed
from asr_kd.errors import AudioError

BLOCK = 10.0  # seconds that are decoded at once
FRAME = 0.1  # seconds by which segments may exceed a recording: other tools round their bounds


class Recording:
    """A local recording. Memory holds a segment and a block; segments in the order of their starts need one decoding pass.

    `name`: for messages; `seconds`, `rate` in Hz: as its header states them; `channels`: the most of them in what was decoded so far. It raises AudioError as `measure`.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.seconds, self.rate, extension = measure(path, name)
        self.slack = max(FRAME, MP3_SLACK / max(self.rate, 1)) if extension == "mp3" else FRAME
        self._begin()

    def _begin(self) -> None:
        self._blocks: Iterator[tuple[int, np.ndarray]] = native_blocks(self.path, self.name, BLOCK)
        self._failed: AudioError | None = None
        self._rate, self.channels, self._at = 0, 0, 0  # `_at`: the first sample that is held
        self._held = np.empty((0, 1), np.float32)

    def bounds(self, start: float, end: float | None) -> tuple[float, float]:
        """The bounds in seconds of a segment, limited to the recording; `end` None: its end. AudioError when it lies outside."""
        stop = self.seconds if end is None else end
        if not self.seconds:
            raise AudioError(f"{self.name}: holds no samples (zero length); leave it out")
        segment = f"{self.name}: the segment from {start:g} to {stop:g} s"
        if stop <= start:
            raise AudioError(f"{segment} is empty; it must end after it starts")
        if start < -self.slack or stop > self.seconds + self.slack or start >= self.seconds:
            raise AudioError(f"{segment} lies outside of the recording, which has {self.seconds:.3f} s")
        return max(start, 0.0), min(stop, self.seconds)

    def cut(self, start: float, end: float, sample_rate: int | None) -> tuple[np.ndarray, int]:
        """The waveform of a segment, float32 [samples], and its rate: `sample_rate`, or its own; AudioError as `decode`."""
        if self._rate and round(start * self._rate) < self._at:
            self._begin()
        samples = self._samples(start, end)
        wanted = sample_rate or self._rate
        with named(f"{self.name}, {start:g} to {end:g} s"):
            return converted(mixed([samples]), self._rate, wanted), wanted

    def _samples(self, start: float, end: float) -> np.ndarray:
        """Float32 [samples, channels] of a segment; they are kept for the next one, with what was decoded after them."""
        while not self._rate or self._at + len(self._held) < round(end * self._rate):
            if self._failed:
                raise self._failed
            try:
                block = next(self._blocks, None)
            except AudioError as error:
                self._failed = error
                continue
            if block is None:  # an MP3 may be a little shorter than stated
                break
            self._rate, samples = block
            self.channels = max(self.channels, samples.shape[1])
            gone = min(max(0, round(start * self._rate) - self._at), len(self._held))
            held = self._held[gone:]
            if len(held) and held.shape[1] != samples.shape[1]:  # joined recordings of one and of two channels
                held, samples = held.mean(axis=1, keepdims=True), samples.mean(axis=1, keepdims=True)
            self._at += gone
            self._held = np.concatenate([held, samples]) if len(held) else samples
        first = round(start * self._rate) - self._at
        return self._held[first : round(end * self._rate) - self._at]
