"""Job `prepare`, with checkpoints that find the words of a text in a recording."""

from __future__ import annotations

from asr_kd.shards.prepare import prepare as prepare_shards
from asr_kd.shards.settings import PrepareSettings


def prepare(settings: PrepareSettings) -> None:
    """As `asr_kd.shards.prepare.prepare`, where `segment.aligner` is a checkpoint."""
    if not settings.segment or not settings.segment.aligner:
        prepare_shards(settings)
        return
    from asr_kd.decoding.aligning import Aligner  # loads torch, which no other preparing needs

    prepare_shards(settings, Aligner)
