"""`asr_kd.soft_targets`: the soft targets of a folder, by utterance."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from asr_kd.errors import UserError
from asr_kd.files import names_in, place
from asr_kd.shards.tarset import read_members
from asr_kd.targets.combine import resample
from asr_kd.targets.hidden import HiddenStates, decode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import Quantiser, read_quantiser
from asr_kd.targets.store import (
    SUFFIX,
    Labelled,
    TargetMetadata,
    check_answers,
    metadata_of,
    read_labelled_shard,
    read_metadata,
    tail_prior,
)

#: shards that are in memory at most
HELD = 8


class NoTarget(UserError, KeyError):
    """There is no soft target of this key."""

    def __str__(self) -> str:  # that of a KeyError has quotes around it
        return str(self.args[0])


@dataclass(frozen=True, eq=False, repr=False)
class SoftTarget:
    """What a teacher said in each frame of an utterance, as it is stored: the likely units, and the mass of all others.

    Attributes:
        posteriors: entry by entry, as the reader has them.
        frame_ms: period of a frame in milliseconds.
        offset_ms: start of the first frame in the audio, in milliseconds.
        prior: float64 [units], the proportions in which the shard spreads the mass that was not kept; None where it has none.
        states: the teacher's hidden states; None where none are stored.
    """

    key: str
    posteriors: SparsePosteriors
    frame_ms: int
    offset_ms: int = 0
    prior: np.ndarray | None = None
    states: HiddenStates | None = None

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.posteriors.frames

    @property
    def num_units(self) -> int:
        """Number of units of the whole distribution."""
        return self.posteriors.num_units

    @property
    def indices(self) -> np.ndarray:
        """Units that were kept, int64 [frames, most of a frame], the best of each frame first; unit 0 (the blank) where there is none."""
        return self.posteriors.padded(int(self.posteriors.counts.max()))[0]

    @property
    def probabilities(self) -> np.ndarray:
        """Their probabilities, float32 [frames, most of a frame], 0 where there is none."""
        return self.posteriors.padded(int(self.posteriors.counts.max()))[1]

    @property
    def tail(self) -> np.ndarray:
        """The probability of all other units together, float32 [frames]."""
        return self.posteriors.tail

    def dense(self, missing_mass: Literal["prior", "uniform", "renormalise"] = "prior") -> np.ndarray:
        """The probabilities of all units, float32 [frames, units], of each frame adding up to 1.

        Args:
            missing_mass: what becomes of the tail: spread over the other units like the shard's prior, or evenly; or left out.

        Raises:
            UserError: when the shard has no prior.
        """
        if missing_mass == "renormalise":
            return replace(self.posteriors, tail=np.zeros_like(self.tail)).dense()
        if missing_mass == "prior" and self.prior is None:
            raise UserError(f"{self.key}: its shard has no prior; use missing_mass='uniform'")
        return self.posteriors.dense(self.prior if missing_mass == "prior" else None)

    def hidden(self, tap: str) -> np.ndarray:
        """The teacher's hidden states of a layer, float32 [frames, width]; of stored events zeros in the frames outside of them.

        Raises:
            UserError: when none are stored of this layer.
        """
        taps = self.states.taps if self.states else {}
        if self.states is None or tap not in taps:
            there = f"it has {', '.join(taps)}" if taps else "make some with `asr-kd label mode=hidden taps=[…]`"
            raise UserError(f"{self.key}: no hidden states of {tap} are stored; {there}")
        return self.states.of_frames(tap)

    def resampled(self, frame_ms: int, frames: int) -> SoftTarget:
        """The same for a network of another frame period: `frames` frames of `frame_ms` milliseconds from the start of the audio on.

        Each is the mean of those that it overlaps. Hidden states stay behind.

        Raises:
            UserError: when the two cover another stretch of time.
        """
        try:
            moved = resample(self.posteriors, self.frame_ms, self.offset_ms, frames, frame_ms, self.prior)
        except UserError as error:
            raise UserError(f"{self.key}: {error}") from None
        return replace(self, posteriors=moved, frame_ms=frame_ms, offset_ms=0, states=None)

    def __repr__(self) -> str:
        kept = len(self.posteriors.units) / self.frames
        return f"SoftTarget({self.key!r}, {self.frames} frames of {self.frame_ms} ms, {kept:.2f} of {self.num_units} units a frame)"


@dataclass
class _Shard:
    metadata: TargetMetadata
    prior: np.ndarray | None
    utterances: dict[str, Labelled]


class SoftTargets(Mapping[str, SoftTarget]):
    """The soft targets of a folder: key of the utterance → `SoftTarget`, in the order of the shards.

    A few shards are in memory at a time, so read in this order, or in that of the audio. To find a key, names are read, shard by shard from
    the first on, and kept.

    Attributes:
        metadata: of the first shard; all are of the same teacher, units and frames.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = place(os.fspath(folder))
        self.metadata = metadata_of(self.folder)
        self._names = sorted(name for name in names_in(self.folder) if name.endswith(".tar"))
        self._where: dict[str, str] = {}  # the shard of each key that was met
        self._unread = iter(self._names)
        self._held: dict[str, _Shard] = {}
        self._count: int | None = None
        hidden = self.metadata.hidden
        self._quantiser: Quantiser | None = None
        if hidden and hidden.quantiser:
            self._quantiser = read_quantiser(self.folder, hidden.quantiser)

    @property
    def frame_ms(self) -> int:
        """Period of a frame in milliseconds."""
        return self.metadata.frame_ms

    @property
    def num_units(self) -> int:
        """Number of units, the blank among them."""
        return self.metadata.num_units

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(read_metadata(self.folder / name).statistics.utterances for name in self._names)
        return self._count

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            yield from self._keys(name)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._shard_of(key) is not None

    def __getitem__(self, key: str) -> SoftTarget:
        name = self._shard_of(key)
        if name is None:
            raise self._missing(key)
        return self._target(self._shard(name), key)

    def join(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A stage for `asr_kd.dataset(…).compose(…)`: each sample gets its soft target as `target`.

        Samples without one, which the teacher could not hear, are passed over.

        Raises:
            UserError: when a shard answers other audio, or lacks a key.
        """
        for sample in samples:
            info, key = sample["__shard__"], sample["__key__"]
            shard = self._shard(info.name)
            check_answers(self.folder / info.name, shard.metadata, sample["__url__"], info.sha256)
            if key in shard.metadata.quarantined:
                continue
            if key not in shard.utterances:
                raise UserError(
                    f"{self.folder / info.name}: has no {key} of {sample['__url__']}; label this audio again"
                )
            yield {**sample, "target": self._target(shard, key)}

    def _keys(self, name: str) -> list[str]:
        members = (member for member, _ in read_members(self.folder / name))
        keys = [member.removesuffix(SUFFIX) for member in members if member.endswith(SUFFIX)]
        self._where |= dict.fromkeys(keys, name)
        return keys

    def _shard_of(self, key: str) -> str | None:
        while key not in self._where:
            if (name := next(self._unread, None)) is None:
                return None
            self._keys(name)
        return self._where[key]

    def _shard(self, name: str) -> _Shard:
        if name not in self._held:
            path = self.folder / name
            first = self.metadata
            metadata, utterances = read_labelled_shard(path, first.units_hash, first.num_units, first.frame_ms)
            if metadata.teacher != first.teacher:
                raise UserError(
                    f"{path}: is of teacher {metadata.teacher}, the first shard of {self.folder} of {first.teacher}; label this audio again"
                )
            prior = tail_prior(path, metadata) if metadata.version > 1 else None
            shard = _Shard(metadata, prior, {one.key: one for one in utterances})
            while len(self._held) >= HELD:
                del self._held[next(iter(self._held))]
            self._held[name] = shard
        return self._held[name]

    def _target(self, shard: _Shard, key: str) -> SoftTarget:
        metadata, found = shard.metadata, shard.utterances[key]
        states = None
        if metadata.hidden and found.hidden is not None:
            states = decode_hidden(found.hidden, metadata.hidden, key, self._quantiser)
        return SoftTarget(key, found.target, metadata.frame_ms, metadata.offset_ms, shard.prior, states)

    def _missing(self, key: str) -> NoTarget:
        for name in self._names:
            if reason := read_metadata(self.folder / name).quarantined.get(key):
                return NoTarget(f"{self.folder}: {key} was left out, since the teacher could not hear it: {reason}")
        return NoTarget(f"{self.folder}: has no soft target of {key!r}; label its audio, or look at the keys (list(…))")

    def __repr__(self) -> str:
        return (
            f"SoftTargets('{self.folder}', {len(self):,} utterances, frames of {self.frame_ms} ms, {self.num_units} units, teacher "
            f"{self.metadata.teacher})"
        )


def soft_targets(folder: str | os.PathLike[str]) -> SoftTargets:
    """The soft targets that `asr-kd label` has written, by the keys of the utterances.

    >>> targets = asr_kd.soft_targets("targets")
    >>> len(targets), "u1" in targets
    (3, True)
    >>> targets["u1"]
    SoftTarget('u1', 26 frames of 30 ms, ... of 10 units a frame)
    >>> targets["u1"].dense().shape
    (26, 10)
    >>> targets["u9"]
    Traceback (most recent call last):
    ...
    asr_kd.api.soft_targets.NoTarget: targets: has no soft target of 'u9'; label its audio, or look at the keys (list(…))

    Args:
        folder: or its URL.

    Raises:
        UserError: when it holds none; from what is returned: when a shard is damaged, or of another teacher. A key without a soft target is a
            KeyError too.
    """
    return SoftTargets(folder)
