"""Settings of `prepare` and `units`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from asr_kd.audio.settings import SampleRate
from asr_kd.config.base import Count, Location, Positive, Settings, Share
from asr_kd.config.knobs import MAX_BAD_SHARE, MAX_SECONDS, Normalizing, Texts


class PrepareSettings(Settings):
    """Manifest → audio shards."""

    manifest: Location = Field(
        description="JSONL: audio (a path or a URL), and optionally text, key, start and end in seconds, anything else"
    )
    output: Location = Field(description="folder of the shards, or its URL (s3://…, gs://…)")
    samples_per_shard: Count = Field(500, description="utterances in a shard")
    sample_rate: SampleRate | None = Field(None, description="convert to this rate in Hz; null keeps each file's own")
    max_seconds: Positive = MAX_SECONDS
    max_bad_share: Share = MAX_BAD_SHARE
    drop_text: bool = Field(
        False, description="leave transcripts out of the shards, for audio that counts as unlabelled"
    )
    normalizer: Normalizing = Field(
        "none", description="of the texts, as of eval; none: they are written as they stand"
    )


class UnitsSettings(Settings):
    """Labelled text → sentencepiece model."""

    source: Texts
    output: Location = Field(description="folder of the units")
    normalizer: Normalizing = Field(
        "none",
        description="what texts go through before they are spelt, here and wherever the units are used; as of eval",
    )
    kind: Literal["unigram", "bpe", "char"] = Field("unigram", description="how text is cut into pieces")
    size: Annotated[int, Field(ge=4, le=65000)] = Field(500, description="pieces at most; with char, an upper bound")
