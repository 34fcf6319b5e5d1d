"""A shard's audio → the teacher's input. Does not import torch, so that a loader process starts in a second."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import AudioError
from asr_kd.labeling.settings import LabelSettings
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.tarset import read_checked
from asr_kd.units import Units

#: why an utterance without text is quarantined in mode alignment
NO_TEXT = "no text to align to"


@dataclass
class Heard:
    """An utterance of an audio shard: features float16 [frames, inputs], or None and a reason."""

    key: str
    features: np.ndarray | None
    seconds: float
    text: str | None
    reason: str = ""


@dataclass
class HeardShard:
    """All utterances of a shard, in its order."""

    info: ShardInfo
    utterances: list[Heard]


@dataclass
class Loaded:
    """A shard's utterances as network input, in its order; `quarantined`: key → why it cannot be labelled."""

    info: ShardInfo
    keys: list[str] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)


def read_features(settings: LabelSettings, features: FeatureSettings, info: ShardInfo) -> HeardShard:
    """Decode a shard's audio and compute its features."""
    frontend = Frontend(features)
    utterances = []
    for sample in read_checked(settings.audio, info):
        text = sample.fields.get("text")
        heard = Heard(sample.key, None, 0.0, text if isinstance(text, str) else None)
        try:
            waveform, rate = decode(sample.audio, sample.key, features.sample_rate, settings.max_seconds)
            heard.features = frontend.compute(waveform)
            heard.seconds = len(waveform) / rate
        except AudioError as error:
            heard.reason = str(error)
        utterances.append(heard)
    return HeardShard(info, utterances)


def select(settings: LabelSettings, units: Units, transcripts: dict[str, str] | None, heard: HeardShard) -> Loaded:
    """The utterances of a shard that can be labelled; the others are quarantined.

    Args:
        units: vocabulary of the teacher.
        transcripts: key → text in place of the text in the shard; only mode alignment needs texts.
        heard: the shard.
    """
    loaded = Loaded(heard.info)
    for one in heard.utterances:
        if one.features is None:
            loaded.quarantined[one.key] = one.reason
            continue
        ids: list[int] = []
        if settings.mode == "alignment":
            text = one.text if transcripts is None else transcripts.get(one.key)
            if text is None:
                loaded.quarantined[one.key] = NO_TEXT
                continue
            ids = units.encode(text)
            if units.unknown in ids:
                loaded.quarantined[one.key] = (
                    f"text holds {units.unwritable(text)[0]!r}, which the teacher's units cannot spell"
                )
                continue
            needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
            if needed > len(one.features):
                loaded.quarantined[one.key] = (
                    f"text too long: its {len(ids)} units do not fit into {len(one.features)} frames"
                )
                continue
        loaded.keys.append(one.key)
        loaded.features.append(one.features)
        loaded.seconds.append(one.seconds)
        loaded.ids.append(ids)
    return loaded
