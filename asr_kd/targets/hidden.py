"""Hidden states of a teacher on disk, beside its posteriors: of frames, of spikes as events, or as codes of a quantiser.

The format is described in README.md beside this file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from asr_kd.config.base import Settings
from asr_kd.errors import UserError
from asr_kd.targets.quantiser import Quantiser
from asr_kd.targets.settings import Keep

MAGIC, VERSION = b"AKDH", 1
#: name of a tap's codes among the hidden states of who answers: this and the name of the tap
CODES = "codes."
_HEADER = struct.Struct("<4sBBHIII")  # magic, version, what is kept, taps, frames, rows, crc32
_KEEPS: tuple[Keep, ...] = ("events", "frames", "codes")


class HiddenDescription(Settings):
    """What a shard holds of its teacher's hidden states.

    Attributes:
        version: of the members.
        keep: rows are those of events, of frames, or codes of frames.
        taps: name → width; members have them in the order of their names.
        codebooks: bytes a frame and tap, of codes.
        quantiser: fingerprint of the tables that made the codes.
        rows: of all utterances.
        bytes_per_frame: of the members, all taps together.
        lost: of each tap the squared error of what is stored, as a share of the variance of the rows; 1 is as bad as their mean.
    """

    version: int = VERSION
    keep: Keep
    taps: dict[str, int]
    codebooks: int | None = None
    quantiser: str | None = None
    rows: int
    bytes_per_frame: float
    lost: dict[str, float]

    @property
    def kind(self) -> dict[str, Any]:
        """What all shards of a folder have in common."""
        return self.model_dump(include={"keep", "taps", "codebooks", "quantiser"})


@dataclass
class HiddenStates:
    """What is stored of an utterance.

    Attributes:
        frames: of the utterance.
        taps: of each tap float16 [rows, width], or of codes uint8 [frames, codebooks].
        edges: of events int64 [2, events]: the first frame of each spike, and one past its last.
        quantiser: that decodes the codes.
    """

    keep: Keep
    frames: int
    taps: dict[str, np.ndarray]
    edges: np.ndarray | None = None
    quantiser: Quantiser | None = None

    def of_frames(self, name: str) -> np.ndarray:
        """A row for each frame: float32 [frames, width] of a tap, or with `codes.` before its name its codes, int64 [frames, codebooks].

        Frames of a spike have its event, all others zeros. So a stretch of time may double, drop or join spikes, and whoever averages
        over one has its event.
        """
        if name.startswith(CODES):
            return self.taps[name.removeprefix(CODES)].astype(np.int64)
        stored = self.taps[name]
        if self.quantiser is not None:
            return self.quantiser.decode(name, stored)
        if self.edges is None:
            return stored.astype(np.float32)
        rows = np.zeros((self.frames, stored.shape[1]), np.float32)
        lengths = self.edges[1] - self.edges[0]
        inside = np.arange(lengths.sum()) + np.repeat(self.edges[0] - np.cumsum(lengths) + lengths, lengths)
        rows[inside] = np.repeat(stored, lengths, axis=0)
        return rows

    def __getitem__(self, frames: slice) -> HiddenStates:
        """A stretch of frames; not of events."""
        if self.edges is not None:
            raise ValueError("events are those of a whole utterance")
        taps = {name: rows[frames] for name, rows in self.taps.items()}
        return replace(self, frames=len(range(*frames.indices(self.frames))), taps=taps)


@dataclass
class SideBySide:
    """What is stored of an utterance by several teachers: a row holds their states one beside the other."""

    of: list[HiddenStates]

    def of_frames(self, name: str) -> np.ndarray:
        """As of `HiddenStates`, as wide as those of all teachers together."""
        return np.concatenate([one.of_frames(name) for one in self.of], 1)

    def __getitem__(self, frames: slice) -> SideBySide:
        """As of `HiddenStates`."""
        return SideBySide([one[frames] for one in self.of])


def encode_hidden(states: HiddenStates) -> bytes:
    """The bytes of an utterance's hidden states."""
    columns = [] if states.edges is None else [states.edges.astype("<u4")]
    columns += [rows.astype("u1" if states.keep == "codes" else "<f2") for _, rows in sorted(states.taps.items())]
    body = b"".join(column.tobytes() for column in columns)
    rows = states.frames if states.edges is None else states.edges.shape[1]
    header = [MAGIC, VERSION, _KEEPS.index(states.keep), len(states.taps), states.frames, rows]
    return _HEADER.pack(*header, zlib.crc32(body, zlib.crc32(_HEADER.pack(*header, 0)))) + body


def decode_hidden(
    data: bytes, description: HiddenDescription, name: str = "hidden states", quantiser: Quantiser | None = None
) -> HiddenStates:
    """The hidden states in `data`, a result of `encode_hidden`.

    Args:
        data: of one utterance.
        description: of its shard.
        name: begins messages.
        quantiser: that made the codes, if they are to be decoded.

    Raises:
        UserError: when `data` is damaged, of a newer version, or not what the shard says.
    """
    if len(data) < _HEADER.size or data[:4] != MAGIC:
        raise UserError(f"{name}: not hidden states of asr_kd; label the audio again")
    _, version, keep, taps, frames, rows, crc = _HEADER.unpack_from(data)
    if not 1 <= version <= VERSION:
        raise UserError(f"{name}: hidden states of version {version}, this program reads {VERSION}; use a newer asr_kd")
    damaged = f"{name}: damaged ({{}}); label the audio again"
    body = memoryview(data)[_HEADER.size :]
    if zlib.crc32(body, zlib.crc32(_HEADER.pack(*_HEADER.unpack_from(data)[:-1], 0))) != crc:
        raise UserError(damaged.format("the checksum differs"))
    wide: Mapping[str, int] = description.taps
    coded, events = description.keep == "codes", description.keep == "events"
    kind: np.dtype[Any] = np.dtype("u1" if coded else "<f2")
    if coded:
        wide = dict.fromkeys(wide, description.codebooks or 0)
    size = rows * (8 * events + kind.itemsize * sum(wide.values()))
    if keep >= len(_KEEPS) or _KEEPS[keep] != description.keep or taps != len(wide) or len(body) != size:
        raise UserError(damaged.format("it is not what its shard says"))
    if not events and rows != frames:
        raise UserError(damaged.format("a row is missing"))
    edges, at = None, 0
    if events:
        edges, at = np.frombuffer(body, "<u4", 2 * rows).astype(np.int64).reshape(2, rows), 8 * rows
        if (edges[0] >= edges[1]).any() or (edges[0, 1:] < edges[1, :-1]).any() or edges.max(initial=0) > frames:
            raise UserError(damaged.format("spikes overlap"))
    found = {}
    for tap, width in sorted(wide.items()):
        found[tap] = np.frombuffer(body, kind, rows * width, at).reshape(rows, width)
        at += rows * width * kind.itemsize
    return HiddenStates(description.keep, frames, found, edges, quantiser)
