"""The soft targets of an audio shard for a learner: of one teacher as stored, of several combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.files import Place, place
from asr_kd.shards.index import ShardInfo
from asr_kd.targets.combine import combine, combine_priors, resample
from asr_kd.targets.hidden import HiddenDescription, HiddenStates, decode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import Quantiser
from asr_kd.targets.store import TargetMetadata, check_answers, read_labelled_shard, tail_prior
from asr_kd.units import Units


@dataclass
class TargetSet:
    """One teacher's soft targets of the shard.

    Attributes:
        prior: float64 [units], the proportions in which its tails are spread.
        hidden: bytes of its hidden states, if anything is learned from them.
    """

    folder: str
    path: Place
    metadata: TargetMetadata
    targets: dict[str, SparsePosteriors]
    prior: np.ndarray
    weight: float
    hidden: dict[str, bytes]


class Found(NamedTuple):
    """What there is for an utterance.

    Attributes:
        target: if any.
        prior: as of `Example.prior`.
        lacking: the sets that lack its key.
        hidden: if anything is learned from hidden states.
    """

    target: SparsePosteriors | None
    prior: np.ndarray | None
    lacking: list[str]
    hidden: HiddenStates | None = None


class ShardTargets:
    """Soft targets of one audio shard, of all sets of a source.

    Args:
        frame_ms: frame period of the learner, ms.
        with_prior: whether tails are spread like the shard's prior; else they are spread evenly, if at all.
        hidden: what its one set must hold of hidden states; None: nothing is learned from them.
        quantiser: that decodes them, if they are codes.

    Raises:
        UserError: when a set does not fit the units, the audio shard or, without `resample`, the frames.
    """

    def __init__(
        self,
        source: SourceSettings,
        shard: ShardInfo,
        units: Units,
        frame_ms: int,
        with_prior: bool,
        hidden: HiddenDescription | None = None,
        quantiser: Quantiser | None = None,
    ) -> None:
        self.source, self.frame_ms, self.with_prior = source, frame_ms, with_prior
        self.hidden, self.quantiser = hidden, quantiser
        weights = source.combine.weights or [1.0] * len(source.target_sets)
        weighted = zip(source.target_sets, weights, strict=True)
        self.sets = [self._open(folder, weight, shard, units) for folder, weight in weighted]
        self._priors: dict[tuple[str, ...], np.ndarray] = {}

    def _open(self, folder: str, weight: float, shard: ShardInfo, units: Units) -> TargetSet:
        path = place(folder) / shard.name
        wanted_ms = None if self.source.resample else self.frame_ms
        metadata, utterances = read_labelled_shard(path, units.hash, units.size, wanted_ms)
        check_answers(path, metadata, f"{self.source.audio}/{shard.name}", shard.sha256)
        if metadata.offset_ms and not self.source.resample:
            raise UserError(
                f"{path}: its first frame begins {metadata.offset_ms} ms into the audio, the learner's at 0; set resample=true"
            )
        # a mode is set for several sets alone
        if self.source.combine.mode == "log_mean" and metadata.selection.mode in ("sampled", "alignment"):
            raise UserError(
                f"{path}: mode {metadata.selection.mode} gives most units no probability, combine.mode=log_mean needs one of "
                "every unit; choose combine.mode=mean"
            )
        prior = tail_prior(path, metadata) if self.with_prior else np.full(units.size, 1.0 / units.size)
        if self.hidden and (metadata.hidden is None or metadata.hidden.kind != self.hidden.kind):
            raise UserError(
                f"{path}: holds other hidden states than the first shard of {folder}; label this audio again"
            )
        targets, hidden = {}, {}
        for key, target, states in utterances:
            targets[key] = target
            if self.hidden and states is not None:
                hidden[key] = states
        return TargetSet(folder, path, metadata, targets, prior, weight, hidden)

    def find(self, key: str, frames: int) -> Found:
        """The soft target of an utterance of so many feature frames; of several teachers, those that have it are combined.

        Raises:
            UserError: when a set has another number of frames than the audio.
        """
        present = [one for one in self.sets if key in one.targets]
        lacking = [one.folder for one in self.sets if key not in one.targets]
        if not present:
            return Found(None, None, lacking)
        targets = [self._target(one, key, frames) for one in present]
        prior = self._prior(present) if self.with_prior else None
        if len(present) == 1:
            return Found(targets[0], prior, lacking, self._hidden(present[0], key, frames))
        weights, priors = [one.weight for one in present], [one.prior for one in present]
        try:
            return Found(combine(targets, self.source.combine.mode, weights, priors), prior, lacking)
        except UserError as error:
            raise UserError(f"{' and '.join(str(one.path) for one in present)}: {key}: {error}") from None

    def _target(self, one: TargetSet, key: str, frames: int) -> SparsePosteriors:
        target, metadata = one.targets[key], one.metadata
        if self.source.resample:
            try:
                return resample(target, metadata.frame_ms, metadata.offset_ms, frames, self.frame_ms, one.prior)
            except UserError as error:
                raise UserError(f"{one.path}: {key}: {error}") from None
        if target.frames != frames:
            raise UserError(
                f"{one.path}: {key} has {target.frames} target frames for {frames} feature frames; label this audio with "
                "these feature settings again"
            )
        return target

    def _hidden(self, one: TargetSet, key: str, frames: int) -> HiddenStates | None:
        if self.hidden is None:
            return None
        states = decode_hidden(one.hidden[key], self.hidden, f"{one.path}: {key}", self.quantiser)
        if states.frames != frames:
            raise UserError(
                f"{one.path}: {key} has hidden states of {states.frames} frames for {frames} feature frames; label this audio again"
            )
        return states

    def _prior(self, present: list[TargetSet]) -> np.ndarray:
        """One array shared by all utterances of the same teachers, so that a batch holds it once."""
        folders = tuple(one.folder for one in present)
        if folders not in self._priors:
            prior = present[0].prior
            if len(present) > 1:
                weights, priors = [one.weight for one in present], [one.prior for one in present]
                left = [max(0.0, 1.0 - one.metadata.statistics.mean_kept_mass) for one in present]  # mean mass not kept
                prior = combine_priors(priors, self.source.combine.mode, weights, left)
            self._priors[folders] = prior.astype(np.float32)
        return self._priors[folders]
