"""The soft targets of an audio shard for a learner: of one teacher as stored, of several combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asr_kd.distillation.opinion import Opinion
from asr_kd.distillation.settings import SourceSettings
from asr_kd.distillation.stored import Held
from asr_kd.errors import UserError
from asr_kd.files import Place, place
from asr_kd.shards.chosen import Pair
from asr_kd.shards.index import ShardInfo
from asr_kd.targets.combine import combine, combine_priors, resample
from asr_kd.targets.hidden import HiddenStates, SideBySide, decode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import TargetMetadata, check_answers, read_labelled_shard, tail_prior
from asr_kd.units import Units


@dataclass
class TargetSet:
    """One teacher's soft targets of the shard.

    Attributes:
        prior: float64 [units], the proportions in which its tails are spread.
        held: what it holds of hidden states, if anything is learned from them.
        hidden: their bytes.
    """

    folder: str
    path: Place
    metadata: TargetMetadata
    targets: dict[str, SparsePosteriors]
    prior: np.ndarray
    weight: float
    held: Held | None
    hidden: dict[str, bytes]


class Found(NamedTuple):
    """What there is for an utterance.

    Attributes:
        target: if any.
        prior: as of `Example.prior`.
        lacking: the sets that lack its key.
        hidden: if anything is learned from hidden states; of several teachers one beside the other.
    """

    target: SparsePosteriors | None
    prior: np.ndarray | None
    lacking: list[str]
    hidden: HiddenStates | SideBySide | None = None


class ShardTargets:
    """Soft targets of one audio shard, of all sets of a source.

    Args:
        frame_ms: frame period of the learner, ms.
        with_prior: whether tails are spread like the shard's prior; else they are spread evenly, if at all.
        held: what each set must hold of hidden states; empty: nothing is learned from them.
        opinion: of a language model that has a say, if any.
        pairs: of the shard's utterances, where the targets answer other recordings; None: they answer these.

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
        held: Sequence[Held] = (),
        opinion: Opinion | None = None,
        pairs: dict[str, Pair] | None = None,
    ) -> None:
        self.pairs = pairs
        self.source, self.frame_ms, self.with_prior = source, frame_ms, with_prior
        self.opinion = opinion
        folders = source.target_sets
        each: Sequence[Held | None] = held or [None] * len(folders)
        asked = zip(folders, source.combine.numbers(len(folders)), each, strict=True)
        answered = {(shard.name, shard.sha256)} if pairs is None else {pair[:2] for pair in pairs.values()}
        self.sets = [
            self._open(folder, weight, one, name, sha256, units)
            for folder, weight, one in asked
            for name, sha256 in sorted(answered)
        ]
        self._priors: dict[tuple[Place, ...], np.ndarray] = {}

    def _open(self, folder: str, weight: float, held: Held | None, name: str, sha256: str, units: Units) -> TargetSet:
        """The targets of a shard of this name; with pairs, of the utterances that are paired with those of that shard."""
        path, pairs = place(folder) / name, self.pairs
        wanted_ms = None if self.source.resample else self.frame_ms
        metadata, utterances = read_labelled_shard(path, units.hash, units.size, wanted_ms)
        asked = f"{self.source.audio}/{name}" if pairs is None else f"{self.source.pairs}: {name}"
        check_answers(path, metadata, asked, sha256)
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
        if held and (metadata.hidden is None or metadata.hidden.kind != held.description.kind):
            raise UserError(
                f"{path}: holds other hidden states than the first shard of {folder}; label this audio again"
            )
        targets, hidden = {}, {}
        for key, target, states in utterances:
            if pairs is not None and (key not in pairs or pairs[key].heard != name):
                continue
            targets[key] = target
            if held and states is not None:
                hidden[key] = states
        return TargetSet(folder, path, metadata, targets, prior, weight, held, hidden)

    def find(self, key: str, frames: int) -> Found:
        """The soft target of an utterance of so many feature frames; of several teachers, those that have it are combined.

        Of hidden states all teachers must have it: what is learned from them is as wide as all together.

        Raises:
            UserError: when a set has another number of frames than the audio.
        """
        present = [one for one in self.sets if key in one.targets]
        having = {one.folder for one in present}
        lacking = [folder for folder in self.source.target_sets if folder not in having]
        if not present or (lacking and any(one.held for one in present)):
            return Found(None, None, lacking)
        targets = [self._target(one, key, frames) for one in present]
        prior = self._prior(present) if self.with_prior else None
        weights, priors = [one.weight for one in present], [one.prior for one in present]
        try:
            target = combine(targets, self.source.combine.mode, weights, priors)
        except UserError as error:
            raise UserError(f"{' and '.join(str(one.path) for one in present)}: {key}: {error}") from None
        hidden = self._hidden(present, key, frames)
        return Found(self.opinion.of(target) if self.opinion else target, prior, lacking, hidden)

    def _target(self, one: TargetSet, key: str, frames: int) -> SparsePosteriors:
        target, metadata = one.targets[key], one.metadata
        paired = self.pairs is not None
        # by whole frames, which is right to half a frame, and leaves a spike as sharp as it is
        behind = round(self.pairs[key].offset_ms / self.frame_ms) * self.frame_ms if self.pairs else 0
        if self.source.resample or paired:
            given = metadata.frame_ms, metadata.offset_ms + behind
            try:
                return resample(target, *given, frames, self.frame_ms, one.prior, anywhere=paired)
            except UserError as error:
                raise UserError(f"{one.path}: {key}: {error}") from None
        if target.frames != frames:
            raise UserError(
                f"{one.path}: {key} has {target.frames} target frames for {frames} feature frames; label this audio with "
                "these feature settings again"
            )
        return target

    def _hidden(self, present: list[TargetSet], key: str, frames: int) -> HiddenStates | SideBySide | None:
        found = []
        for one in present:
            if one.held is None:
                return None
            states = decode_hidden(one.hidden[key], one.held.description, f"{one.path}: {key}", one.held.quantiser)
            if states.frames != frames:
                raise UserError(
                    f"{one.path}: {key} has hidden states of {states.frames} frames for {frames} feature frames; label this audio again"
                )
            found.append(states)
        return found[0] if len(found) == 1 else SideBySide(found)

    def _prior(self, present: list[TargetSet]) -> np.ndarray:
        """One array shared by all utterances of the same teachers, so that a batch holds it once."""
        paths = tuple(one.path for one in present)
        if paths not in self._priors:
            prior = present[0].prior
            if len(present) > 1:
                weights, priors = [one.weight for one in present], [one.prior for one in present]
                left = [max(0.0, 1.0 - one.metadata.statistics.mean_kept_mass) for one in present]  # mean mass not kept
                prior = combine_priors(priors, self.source.combine.mode, weights, left)
            self._priors[paths] = prior.astype(np.float32)
        return self._priors[paths]
