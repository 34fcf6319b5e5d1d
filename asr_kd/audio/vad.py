"""Voice activity of a recording of any length: for each frame of 32 ms a score of speech and a level, from a stream of blocks."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asr_kd.errors import UserError
from asr_kd.files import sha256_file

RATE = 16000  # Hz at which detectors listen
FRAME = 512  # samples at RATE that get one score
CHUNK = (
    512 * FRAME
)  # samples that are judged at once, whatever the size of the blocks, so that scores are the same for any
CONTEXT = 64  # samples before a frame that Silero's network hears with it
QUIETEST = -80.0  # dB of full scale; below it is silence: dither of 16 bits lies at -98
WINDOW = 937  # frames (30 s) in which the noise floor is looked for
FLOOR = 0.1  # share of the frames of a window that are no louder than its noise floor
STEP = 31  # frames (1 s) that share a noise floor
LOUD = 16.0  # dB above the noise floor where the score of the energy detector is 1

#: scores in 0 … 1 of frames float32 [frames, FRAME], each behind those of the call before
Network = Callable[[np.ndarray], np.ndarray]


@dataclass
class Track:
    """What a detector found.

    Attributes:
        scores: float32 [frames], 0 … 1, of speech in each frame.
        levels: float32 [frames], dB of full scale, at least QUIETEST.
        samples: length of the recording at RATE; the last frame may lie in part behind its end.
    """

    scores: np.ndarray
    levels: np.ndarray
    samples: int


def track(blocks: Iterable[np.ndarray], network: Network | None) -> Track:
    """Listen to a recording. Memory holds a block, a chunk of 16 s, and 8 bytes a frame (0.9 MB an hour).

    Args:
        blocks: float32 [samples] at RATE, of any lengths.
        network: gives the scores; None: the energy above the noise floor does (`above_floor`).
    """
    scores: list[np.ndarray] = []
    levels: list[np.ndarray] = []
    samples = 0
    for chunk in _chunks(blocks):
        samples += len(chunk)
        frames = np.pad(chunk, (0, -len(chunk) % FRAME)).reshape(-1, FRAME)
        # the variance: a constant offset is no sound
        power = np.maximum(frames.var(axis=1, dtype=np.float64), 10 ** (QUIETEST / 10))
        levels.append((10 * np.log10(power)).astype(np.float32))
        if network:
            scores.append(network(frames))
    heard = np.concatenate([np.empty(0, np.float32), *levels])
    return Track(np.concatenate(scores) if scores else above_floor(heard), heard, samples)


def _chunks(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same samples in pieces of CHUNK, the last one shorter."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        if count < CHUNK:
            continue
        whole = np.concatenate(held)
        yield from np.split(whole[: count - count % CHUNK], count // CHUNK)
        held, count = [whole[count - count % CHUNK :]], count % CHUNK
    if count:
        yield np.concatenate(held)


def above_floor(levels: np.ndarray) -> np.ndarray:
    """Scores of frames by their levels in dB, float32 [frames]: 0 at the noise floor, 1 at LOUD above it.

    The floor of a second is the level that FLOOR of the frames in the WINDOW around it do not exceed: a talk pauses more than that, and
    noise that changes within half a minute is followed.
    """
    floors = np.empty_like(levels)
    for start in range(0, len(levels), STEP):
        first = min(max(0, start + STEP // 2 - WINDOW // 2), max(0, len(levels) - WINDOW))
        around = levels[first : first + WINDOW]
        at = int(FLOOR * len(around))
        floors[start : start + STEP] = np.partition(around, at)[at]
    return np.clip((levels - floors) / LOUD, 0.0, 1.0).astype(np.float32)


class Silero:
    """Silero's network over one recording (github.com/snakers4/silero-vad, MIT), many frames in one call."""

    def __init__(self) -> None:
        self._session = _session()
        self._before = np.zeros(CONTEXT, np.float32)
        self._state: list[np.ndarray] = [np.zeros((1, 1, 128), np.float32)] * 2  # of its LSTM

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """See `Network`."""
        ends = np.concatenate([self._before[None], frames[:, -CONTEXT:]])
        heard = np.concatenate([ends[:-1], frames], axis=1).astype(np.float32, copy=False)
        inputs = {"input": heard, "h": self._state[0], "c": self._state[1]}
        scores, *self._state = self._session.run(["speech_probs", "hn", "cn"], inputs)
        self._before = ends[-1]
        return scores.reshape(-1)


def silero_file() -> Path:
    """The network of the installed package, which is not imported: it would load torch. UserError when it is not there."""
    found = importlib.util.find_spec("silero_vad")
    path = Path(found.origin).parent / "data" / "silero_vad_16k_sequence.onnx" if found and found.origin else None
    if path is None or not path.is_file() or importlib.util.find_spec("onnxruntime") is None:
        raise UserError(
            "segment.detector: silero needs silero-vad 6.2.2 or later and onnxruntime; pip install 'asr-kd[vad]', or set segment.detector=energy"
        )
    return path


def silero_mark() -> str:
    """What tells one network of Silero's from another: the SHA-256 of its file."""
    return sha256_file(silero_file())


@functools.cache
def _session() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(silero_file(), options, providers=["CPUExecutionProvider"])
