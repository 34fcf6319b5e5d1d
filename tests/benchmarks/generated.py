"""Generated data for benchmarks: audio shards with an index, and the soft targets beside them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from asr_kd.audio.settings import FeatureSettings
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.tarset import Sample, shard_name, write_index, write_shard
from asr_kd.targets.codec import LEVELS
from asr_kd.targets.codec import VERSION as CODEC_VERSION
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import to_text
from asr_kd.targets.store import Statistics, TargetMetadata, write_target_shard


def write_sets(
    folder: Path,
    shards: Iterable[list[tuple[Sample, SparsePosteriors]]],
    features: FeatureSettings,
    units_hash: str,
    kept: int,
) -> list[ShardInfo]:
    """Write `audio` and `targets` into `folder`, a shard at a time; what the targets lost is not worked out."""
    (folder / "audio").mkdir(parents=True)
    (folder / "targets").mkdir()
    infos = []
    for number, pairs in enumerate(shards):
        info = write_shard(folder / "audio" / shard_name(number), (sample for sample, _ in pairs))
        infos.append(info)
        lost: dict[str, Any] = dict.fromkeys(Statistics.model_fields, 0.0)
        lost |= {"utterances": len(pairs), "frames": sum(target.frames for _, target in pairs)}
        num_units = pairs[0][1].num_units
        values = {
            "codec": {"version": CODEC_VERSION, "levels": LEVELS}, "selection": {"mode": "mass", "k": kept, "mass": 0.999},
            "teacher": "0123456789abcdef", "units_hash": units_hash, "num_units": num_units, "frame_ms": features.frame_ms,
            "features": features.model_dump(), "audio_sha256": info.sha256, "quarantined": {}, "statistics": lost,
            "tail_prior": to_text(np.zeros(num_units, np.uint8)),
        }  # fmt: skip
        targets = ((sample.key, target) for sample, target in pairs)
        write_target_shard(folder / "targets" / info.name, TargetMetadata.model_validate(values), targets)
    write_index(folder / "audio", infos)
    return infos
