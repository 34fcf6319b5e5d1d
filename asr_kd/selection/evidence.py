"""What targets and transcripts tell of an utterance: how sure, how fast, how alike two opinions, and of what it consists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from asr_kd.decoding.wer import word_errors
from asr_kd.distillation.spikes import find_spikes
from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.selection.settings import SelectionSettings
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.manifest import Transcripts
from asr_kd.targets.combine import certainty
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import TargetMetadata, check_answers, read_target_shard
from asr_kd.units import Units

#: modes of labelling whose targets do not say how sure a teacher was
NOT_SURE = ("alignment", "occupancy", "sampled")


@dataclass
class Evidence:
    """What is known of an utterance; None: not known.

    Attributes:
        confidence: in 0 to 1; 0 where nothing is said.
        spoken: words or spikes.
        disagreement: in 0 to 1.
        counts: how often each unit or word is said.
    """

    confidence: float | None = None
    spoken: int | None = None
    disagreement: float | None = None
    counts: Counter[str] = field(default_factory=Counter)


class Witnesses:
    """The targets and transcripts of a job, opened once.

    Raises:
        UserError: when a file is missing or wrong, or says nothing of what is asked.
    """

    def __init__(self, settings: SelectionSettings) -> None:
        self.settings = settings
        self.texts = Transcripts(settings.transcripts) if settings.transcripts else None
        self.others = Transcripts(settings.against) if settings.against else None
        self.lists = self.texts is not None and self.texts.lists
        self._first: TargetMetadata | None = None
        asked = settings.confidence_at_least or (settings.limits and settings.by == "confidence")
        if asked and not settings.targets and not self.lists:
            raise UserError(
                f"{settings.transcripts}: has utterances without an n-best list, and confidence needs one of each; give targets, or "
                "transcribe with decoder=beam nbest=8"
            )

    def of_shard(self, info: ShardInfo) -> dict[str, Evidence]:
        """What the targets of an audio shard tell; empty without targets."""
        if not self.settings.targets:
            return {}
        path, first = place(self.settings.targets) / info.name, self._first
        metadata, pairs = read_target_shard(path, *((first.units_hash, first.num_units) if first else ()))
        self._first = first or metadata
        check_answers(path, metadata, info.at(self.settings.audio), info.sha256)
        if metadata.selection.mode in NOT_SURE:
            raise UserError(
                f"{path}: mode {metadata.selection.mode} does not say how sure the teacher was; label with mode=mass"
            )
        return dict(heard(pairs))

    def add_texts(self, key: str, one: Evidence) -> Evidence:
        """The same with what the transcripts tell of an utterance."""
        text = self.texts.get(key) if self.texts else None
        if self.texts is None or text is None:
            return one if self.texts is None else Evidence(confidence=one.confidence)
        words = text.split()
        one.spoken, one.counts = len(words), Counter(words)
        if self.lists and not self.settings.targets:
            scores = np.array([float(score) for _, score in self.texts.nbest(key)])
            shares = np.exp(scores - scores.max())
            one.confidence = float(shares[0] / shares.sum()) if words else 0.0
        if self.others and (other := self.others.get(key)) is not None:
            one.disagreement = disagreement(text, other)
        return one


def disagreement(text: str, other: str) -> float:
    """Word errors between two texts as a share of the longer one: 0 if they are alike, 1 if no word is."""
    longer = max(len(text.split()), len(other.split()))
    return sum(word_errors(text, other)) / longer if longer else 0.0


def heard(pairs: Iterable[tuple[str, SparsePosteriors]]) -> Iterable[tuple[str, Evidence]]:
    """Key and evidence of each soft target.

    Its confidence is the mean over its spikes of the `certainty` of their peak, the frame with the least blank: most frames are blank, and
    say nothing of how sure the teacher is of the words.
    """
    for key, target in pairs:
        units, probs = target.padded(int(target.counts.max()))
        spikes = find_spikes(torch.from_numpy(units), torch.from_numpy(probs), torch.tensor([target.frames]), 0, 0)
        spoken = np.where(units != Units.blank, probs, 0.0)
        mass, edges = spoken.sum(1), zip(spikes.start.tolist(), spikes.end.tolist(), strict=True)
        peaks = [start + int(mass[start:end].argmax()) for start, end in edges]
        if not peaks:
            yield key, Evidence(0.0, 0)
            continue
        said = units[peaks, spoken[peaks].argmax(1)]
        yield key, Evidence(float(certainty(target)[peaks].mean()), len(peaks), counts=Counter(map(str, said.tolist())))
