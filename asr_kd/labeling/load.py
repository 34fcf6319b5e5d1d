"""Which utterances of a shard can be labelled. Without torch, so that a loader process starts in a second."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from asr_kd.audio.settings import FeatureSettings
from asr_kd.labeling.settings import LabelSettings
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.stream import Item, LoadedShard, ShardInput, load_features
from asr_kd.units import Units

#: why an utterance without text is quarantined in mode alignment
NO_TEXT = "no text to align to"


@dataclass
class Loaded:
    """What can be labelled of a shard, in its order.

    Attributes:
        ids: in mode alignment, the unit ids of each item's text.
        quarantined: key → why it cannot be labelled.
    """

    info: ShardInfo
    items: list[Item] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)

    @property
    def features(self) -> list[np.ndarray]:
        """Of each item, float16 [frames, inputs]."""
        return [item.features for item in self.items]


def load(settings: LabelSettings, features: FeatureSettings, info: ShardInfo) -> tuple[ShardInfo, LoadedShard]:
    """A shard and its utterances as the teacher's input."""
    wanted = ShardInput(folder=settings.audio, features=features, max_seconds=settings.max_seconds)
    return info, load_features(wanted, info)


def select(
    settings: LabelSettings, units: Units, transcripts: dict[str, str] | None, info: ShardInfo, shard: LoadedShard
) -> Loaded:
    """The utterances of a shard that can be labelled; the others are quarantined.

    Args:
        units: vocabulary of the teacher.
        transcripts: key → text in place of the text in the shard; only mode alignment needs texts.
    """
    loaded = Loaded(info, quarantined=dict(shard.bad))
    for item in shard.items:
        ids: list[int] = []
        if settings.mode == "alignment":
            text = item.fields.get("text") if transcripts is None else transcripts.get(item.key)
            ids = units.encode(text) if isinstance(text, str) else []
            reason = units.misfit(text, ids, len(item.features)) if isinstance(text, str) else NO_TEXT
            if reason:
                loaded.quarantined[item.key] = reason
                continue
        loaded.items.append(item)
        loaded.ids.append(ids)
    return loaded
