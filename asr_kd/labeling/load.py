"""Before and after the network: which utterances of a shard can be labelled, and a teacher's answer → the bytes of a soft target.

Without torch, so that a process that does either starts in a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from asr_kd.audio.features import Features
from asr_kd.audio.settings import InputSettings
from asr_kd.config.knobs import made_on_device
from asr_kd.labeling.settings import OF_TEXT, LabelSettings
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.stream import Item, LoadedShard, ShardInput, load_features
from asr_kd.targets import codec
from asr_kd.targets.hidden import HiddenStates, encode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.reduced import Reduced, divergence

if TYPE_CHECKING:  # no torch here
    from asr_kd.models.acoustic import Checkpoint

#: why an utterance without text is quarantined in modes that need one
NO_TEXT = "no text to align to"


@dataclass
class Loaded:
    """What can be labelled of a shard, in its order.

    Attributes:
        ids: in modes alignment and occupancy, the unit ids of each item's text.
        quarantined: key → why it cannot be labelled.
    """

    info: ShardInfo
    items: list[Item] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)

    @property
    def features(self) -> list[Features]:
        """Of each item, as of `Item`."""
        return [item.features for item in self.items]


def deferred(settings: LabelSettings, teacher: Checkpoint) -> bool:
    """Whether the teacher's features are made on its device; one that hears sound has none."""
    return made_on_device(settings.features_on, teacher.device.type) and not teacher.model.hears_sound


def load(
    settings: LabelSettings, features: InputSettings, deferred: bool, info: ShardInfo
) -> tuple[ShardInfo, LoadedShard]:
    """A shard and its utterances as the teacher's input.

    Args:
        settings: of the job.
        features: of the teacher.
        deferred: whether its device makes them.
        info: which shard.
    """
    wanted = ShardInput(folder=settings.audio, features=features, max_seconds=settings.max_seconds, deferred=deferred)
    return info, load_features(wanted, info)


def select(
    settings: LabelSettings,
    teacher: Checkpoint,
    transcripts: dict[str, str] | None,
    info: ShardInfo,
    shard: LoadedShard,
) -> Loaded:
    """The utterances of a shard that can be labelled; the others are quarantined.

    Args:
        settings: of the job.
        teacher: whose units count, and whose output frames.
        transcripts: key → text in place of the text in the shard; only modes alignment and occupancy need texts.
        info: which shard.
        shard: its utterances.
    """
    units, frames = teacher.units, teacher.model.frames
    loaded = Loaded(info, quarantined=dict(shard.bad))
    for item in shard.items:
        ids: list[int] = []
        if settings.mode in OF_TEXT:
            text = item.fields.get("text") if transcripts is None else transcripts.get(item.key)
            ids = units.encode(text) if isinstance(text, str) else []
            reason = units.misfit(text, ids, frames(len(item.features))) if isinstance(text, str) else NO_TEXT
            if reason:
                loaded.quarantined[item.key] = reason
                continue
        loaded.items.append(item)
        loaded.ids.append(ids)
    return loaded


@dataclass
class HiddenAnswer:
    """What is kept of an utterance's hidden states, and sums that tell what was lost.

    Attributes:
        sums: for each tap, float64 [2 + width]: the squared error of what is kept, the squares of what was there, and the
            latter's sum in each dimension. Those of several utterances add up.
    """

    states: HiddenStates
    sums: dict[str, np.ndarray]


@dataclass
class Answer:
    """A teacher's answer for an utterance.

    Attributes:
        best: int [frames], the teacher's most probable unit; empty for an alignment.
        full: its full distribution, reduced; only in modes mass, top_k and hidden.
        hidden: what is kept of its hidden states; only in mode hidden.
    """

    kept: SparsePosteriors
    best: np.ndarray
    full: Reduced | None = None
    hidden: HiddenAnswer | None = None


@dataclass
class Encoded:
    """An utterance's soft target.

    Attributes:
        top1: bool [frames], whether the best unit is the teacher's; empty for an alignment.
        divergence: float64 [frames], in nat; empty without a full distribution.
        hidden: the bytes of the hidden states; only in mode hidden.
    """

    data: bytes
    top1: np.ndarray
    divergence: np.ndarray
    hidden: bytes | None = None


def encode(answer: Answer, draws: int | None) -> Encoded:
    """Encode an answer; `draws`: number of draws a frame in mode sampled."""
    data, kept = codec.encode(answer.kept, draws=draws), answer.kept
    if answer.full is None:
        return Encoded(data, kept.units[kept.starts][: len(answer.best)] == answer.best, np.empty(0))
    # the reported figures are of what a reader will get
    stored = codec.decode(data)
    hidden = None if answer.hidden is None else encode_hidden(answer.hidden.states)
    return Encoded(data, stored.units[stored.starts] == answer.best, divergence(answer.full, stored), hidden)
