"""What the trainer eats: batches from the mixed sources of a phase, in an order that the seed alone decides."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_kd.audio.augment import spec_augment, stretched
from asr_kd.config import PhaseSettings, SourceSettings, TrainSettings
from asr_kd.errors import UserError
from asr_kd.models.acoustic import collate
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.stream import (
    Item,
    LoadedShard,
    ShardInput,
    load_features,
    map_ordered,
    shuffled_batches,
    shuffled_shards,
)
from asr_kd.shards.tarset import ShardInfo, read_index
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import read_target_shard, tail_prior
from asr_kd.units import Units


@dataclass
class Example:
    """An utterance to learn from: features, and unit ids or soft targets or both; `prior` as of `Batch.priors`."""

    item: Item
    ids: list[int] | None
    targets: SparsePosteriors | None
    prior: np.ndarray | None = None


@dataclass
class Batch:
    """One step's input.

    Attributes:
        features: float32 [batch, frames, inputs]; lengths: int64 [batch].
        source: which source of the phase it came from; seconds: of audio, before any stretch.
        labels, label_lengths: unit ids of all utterances in a row and how many each has; None without CTC.
        units, probs: [frames of all utterances, k], tail: [frames of all utterances]; None without soft targets.
        priors, prior: float32 [shards, units], in whose proportions the tail is spread, and int64 [frames of all utterances],
            which of them is the frame's; None unless `missing_mass` is prior.
        spelling: the units, by which labels become words; None without `mwer`.
    """

    features: Tensor
    lengths: Tensor
    source: int
    labels: Tensor | None
    label_lengths: Tensor | None
    units: Tensor | None
    probs: Tensor | None
    tail: Tensor | None
    priors: Tensor | None = None
    prior: Tensor | None = None
    spelling: Units | None = None
    seconds: float = 0.0

    @property
    def frames(self) -> int:
        """Frames of the utterances, padding not counted."""
        return int(self.lengths.sum())


class PhaseStream:
    """The batches of one phase.

    Args:
        settings: of the run.
        phase: the phase's position.
        units: of the learner; soft targets over other units are refused.

    Attributes:
        unused: (key, reason) of utterances of the present pass that could not be used.
    """

    def __init__(self, settings: TrainSettings, phase: int, units: Units) -> None:
        self.settings, self.phase, self.units = settings, phase, units
        self.plan: PhaseSettings = settings.phases[phase]
        self.unused: list[tuple[str, str]] = []
        self.transcripts = [
            read_transcripts(source.transcripts) if source.transcripts else None for source in self.plan.sources
        ]
        indices = [read_index(Path(source.audio)) * source.repeat for source in self.plan.sources]
        self.seconds = [sum(shard.seconds for shard in index) for index in indices]
        self.utterances = sum(shard.samples for index in indices for shard in index)

    def batches(self, number: int) -> Iterator[Batch]:
        """The batches of pass `number`, always the same ones in the same order.

        Sources are interleaved so that all advance through their audio at the same pace.

        Raises:
            UserError: when targets, units or frame period do not fit, or too many utterances cannot be used.
        """
        self.unused = []
        streams = [self._source_batches(index, number) for index in range(len(self.plan.sources))]
        done = [0.0] * len(streams)
        live = set(range(len(streams)))
        order = 0
        while live:
            source = min(live, key=lambda index: (done[index] / max(self.seconds[index], 1e-9), index))
            examples = next(streams[source], None)
            if examples is None:
                live.remove(source)
                continue
            batch = self._collate(
                examples, source, np.random.default_rng([self.settings.seed, self.phase, number, 1, order])
            )
            batch.seconds = (
                sum(len(example.item.features) for example in examples) * self.settings.features.frame_ms / 1000
            )
            done[source] += batch.seconds
            yield batch
            order += 1
        allowed = self.settings.max_bad_share * self.utterances
        if len(self.unused) > allowed:
            key, reason = self.unused[0]
            raise UserError(
                f"{len(self.unused)} of {self.utterances} utterances cannot be used, more than max_bad_share "
                f"{self.settings.max_bad_share} (first: {key}: {reason}); mend the data or raise max_bad_share"
            )

    def _source_batches(self, source: int, number: int) -> Iterator[list[Example]]:
        rng = np.random.default_rng([self.settings.seed, self.phase, number, 0, source])
        folder = self.plan.sources[source].audio
        shards = [shard for _ in range(self.plan.sources[source].repeat) for shard in shuffled_shards(folder, rng)]
        wanted = ShardInput(
            folder=folder,
            features=self.settings.features,
            max_seconds=self.settings.max_seconds,
            cache=self.settings.feature_cache,
        )
        loaded = map_ordered(functools.partial(load_features, wanted), shards, self.settings.loader_workers)
        examples = (
            example
            for shard, content in zip(shards, loaded, strict=True)
            for example in self._examples(source, shard, content)
        )
        return shuffled_batches(
            examples,
            lambda example: len(example.item.features),
            self.plan.sources[source].batch_frames or self.settings.batch_frames,
            self.settings.bucket_utterances,
            rng,
        )

    def _examples(self, source: int, shard: ShardInfo, content: LoadedShard) -> Iterator[Example]:
        plan = self.plan.sources[source]
        self.unused.extend(content.bad)
        targets, prior = self._targets(plan, shard) if plan.targets else ({}, None)
        for item in content.items:
            example = Example(item, None, None, prior)
            if plan.ctc:
                reason = self._label(example, source)
                if reason:
                    self.unused.append((item.key, reason))
                    continue
            if plan.reads_targets:
                example.targets = targets.get(item.key)
                if example.targets is None:
                    self.unused.append((item.key, f"no soft target in {plan.targets}"))
                    continue
                if example.targets.frames != len(item.features):
                    raise UserError(
                        f"{plan.targets}/{shard.name}: {item.key} has {example.targets.frames} target frames for "
                        f"{len(item.features)} feature frames; label this audio with these feature settings again"
                    )
            yield example

    def _label(self, example: Example, source: int) -> str | None:
        item, transcripts = example.item, self.transcripts[source]
        text = item.fields.get("text") if transcripts is None else transcripts.get(item.key)
        if text is None:
            return "no text to learn from"
        example.ids = self.units.encode(text)
        if self.units.unknown in example.ids:
            return "its text holds characters that no unit covers"
        repeats = sum(a == b for a, b in zip(example.ids, example.ids[1:], strict=False))
        # even when stretched to its shortest: CTC without a path has an infinite loss
        frames = round(len(item.features) * (1 - self.plan.sources[source].augment.stretch))
        if len(example.ids) + repeats > frames:
            return f"{len(example.ids)} units do not fit into {frames} frames"
        return None

    def _targets(self, plan: SourceSettings, shard: ShardInfo) -> tuple[dict[str, SparsePosteriors], np.ndarray | None]:
        path = Path(str(plan.targets)) / shard.name
        metadata, targets = read_target_shard(
            path, units_hash=self.units.hash, num_units=self.units.size, frame_ms=self.settings.features.frame_ms
        )
        if metadata.audio_sha256 != shard.sha256:
            raise UserError(
                f"{path}: answers an audio shard with SHA-256 {metadata.audio_sha256[:16]}…, "
                f"{plan.audio}/{shard.name} has {shard.sha256[:16]}…; label this audio again"
            )
        wanted = plan.soft and self.settings.missing_mass == "prior"
        return dict(targets), tail_prior(path, metadata).astype(np.float32) if wanted else None

    def _collate(self, examples: list[Example], source: int, rng: np.random.Generator) -> Batch:
        augment, stack = self.plan.sources[source].augment, self.settings.features.stack
        changed = [stretched(example.item.features, stack, augment, rng) for example in examples]
        features, lengths = collate([spec_augment(rows, stack, augment, rng) for rows, _ in changed])
        batch = Batch(features, lengths, source, None, None, None, None, None)
        if self.plan.sources[source].ctc:
            ids: list[list[int]] = [example.ids or [] for example in examples]
            batch.labels = torch.tensor([unit for row in ids for unit in row], dtype=torch.int64)
            batch.label_lengths = torch.tensor([len(row) for row in ids])
        if self.plan.sources[source].mwer:
            batch.spelling = self.units
        if self.plan.sources[source].reads_targets:
            targets: list[Any] = [example.targets for example in examples]
            k = max(int(target.counts.max()) for target in targets)
            padded = [(*target.padded(k), target.tail) for target in targets]
            units, probs, tails = zip(
                *([array[origin] for array in arrays] for arrays, (_, origin) in zip(padded, changed, strict=True)),
                strict=True,
            )
            batch.units = torch.from_numpy(np.concatenate(units))
            batch.probs = torch.from_numpy(np.concatenate(probs))
            batch.tail = torch.from_numpy(np.concatenate(tails))
            shards = {id(example.prior): example.prior for example in examples if example.prior is not None}
            if shards:
                places = {name: place for place, name in enumerate(shards)}
                batch.priors = torch.from_numpy(np.stack(list(shards.values())))
                which = torch.tensor([places[id(example.prior)] for example in examples])
                batch.prior = which.repeat_interleave(torch.tensor([len(tail) for tail in tails]))
        return batch
