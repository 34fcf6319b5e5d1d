"""Moments of a teacher's own features: what is kept of the audio that it knows, where the audio itself cannot be had.

Of each frame the mean and the covariance, as principal axes, which tell how neighbouring mel bands move together; along each axis how much successive
frames differ; and in what share of the frames the teacher speaks. They take the place of the batch statistics by which inverted images are held near
real ones (DeepInversion, Yin et al. 2019, arXiv 1912.08795), which recurrent networks do not have.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from asr_kd.errors import UserError
from asr_kd.files import Place, place, readable, write_whole

FORMAT = "asr_kd-moments-1"
#: variance along an axis at least, as a share of the largest: what never moves is not divided by
LEAST = 1e-6


@dataclass(frozen=True)
class Moments:
    """Of the features that a teacher has heard.

    Attributes:
        mean: float32 [dimension].
        axes: float32 [dimension, dimension], a row an axis, of length 1; the greatest variance last.
        variance: float32 [dimension], along each axis, above 0.
        change: float32 [dimension], along each axis the mean square of the difference of successive frames.
        spoken: mean over frames of the teacher's probability of all units but the blank.
        teacher: its fingerprint.
    """

    mean: np.ndarray
    axes: np.ndarray
    variance: np.ndarray
    change: np.ndarray
    spoken: float
    teacher: str

    @property
    def roughness(self) -> np.ndarray:
        """float32 [dimension]: `change` in units of the variance; 2 of frames that know nothing of each other, 0 of what stands still."""
        return np.asarray((self.change / self.variance).clip(0.0, 4.0))

    def coloured(self, white: np.ndarray) -> np.ndarray:
        """White noise of variance 1 as noise with these moments: along each axis a first-order autoregression.

        Args:
            white: float32 [frames, dimension].

        Returns:
            float32 [frames, dimension].
        """
        kept = (1 - self.roughness / 2).clip(-0.999, 0.999)
        fresh = np.sqrt(1 - kept**2)
        rows = white.copy()
        for before, now in itertools.pairwise(rows):
            now *= fresh
            now += kept * before
        return np.asarray(self.mean + (rows * np.sqrt(self.variance)) @ self.axes, np.float32)


class Sums:
    """Sums over utterances, from which their moments follow; memory does not grow with them."""

    def __init__(self, dimension: int) -> None:
        self.frames, self.steps, self.spoken = 0, 0, 0.0
        self._sum = np.zeros(dimension)
        self._squares, self._changes = np.zeros((2, dimension, dimension))

    def add(self, features: np.ndarray, spoken: float) -> None:
        """Count an utterance: features [frames, dimension], and its sum of the teacher's probability of units but the blank."""
        rows = features.astype(np.float64)
        change = np.diff(rows, axis=0)
        self.frames, self.steps, self.spoken = self.frames + len(rows), self.steps + len(change), self.spoken + spoken
        self._sum += rows.sum(axis=0)
        self._squares += rows.T @ rows
        self._changes += change.T @ change

    def moments(self, teacher: str) -> Moments:
        """The moments of what was added, of the teacher with this fingerprint."""
        mean = self._sum / self.frames
        variance, axes = np.linalg.eigh(self._squares / self.frames - np.outer(mean, mean))
        variance = np.maximum(variance, LEAST * max(variance[-1], 1e-12))
        change = ((axes.T @ self._changes) * axes.T).sum(axis=1) / max(self.steps, 1)
        arrays = {"mean": mean, "axes": axes.T, "variance": variance, "change": change}
        singles = {name: array.astype(np.float32) for name, array in arrays.items()}
        return Moments(**singles, spoken=self.spoken / self.frames, teacher=teacher)


def write_moments(path: Place | str, moments: Moments) -> None:
    """Write the file of moments, whole or not at all."""
    arrays = {name: np.ascontiguousarray(getattr(moments, name)) for name in ("mean", "axes", "variance", "change")}
    # one entry, because safetensors writes several in random order
    said = {"moments": json.dumps({"format": FORMAT, "spoken": moments.spoken, "teacher": moments.teacher})}
    with write_whole(path) as file:
        file.write(safetensors.numpy.save(arrays, said))


def read_moments(path: Place | str, dimension: int) -> Moments:
    """The moments in a file; a UserError when it holds none, is damaged, or they are of features of another dimension."""
    with readable(place(path), "file of moments", "make it with `asr-kd moments`"):
        data = place(path).read_bytes()
    try:
        arrays = safetensors.numpy.load(data)
        said = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["moments"])
        if said["format"] != FORMAT:
            raise KeyError("format")
        found = Moments(
            arrays["mean"], arrays["axes"], arrays["variance"], arrays["change"], float(said["spoken"]), str(said["teacher"])
        )  # fmt: skip
        whole = all(np.isfinite(array).all() and array.dtype == np.float32 for array in arrays.values())
        width = len(found.mean)
        shapes = [array.shape for array in (found.mean, found.variance, found.change, found.axes)]
        if not (whole and shapes == [(width,)] * 3 + [(width, width)] and (found.variance > 0).all()):
            raise ValueError("shapes")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: holds no moments ({error}); make them again with `asr-kd moments`") from None
    if width != dimension:
        raise UserError(
            f"{path}: holds moments of features of {width} numbers a frame, this run's have {dimension}; make them with this teacher"
        )
    return found
