"""What corrupting the sound costs beside computing its features: python tests/benchmarks/noise.py AUDIO [--rate 8000] [--json]

AUDIO is a folder of audio shards. Each row decodes the same shards, corrupts every utterance in its way and computes the features,
in one process. Rows take turns, `--passes` times; the fewest CPU seconds of each count. Only ratios are worth comparing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from tables import print_rows

from asr_kd.audio.settings import FeatureSettings, NoiseSettings
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index


def noises() -> dict[str, NoiseSettings | None]:
    """Name → what is done to every utterance."""
    kinds = ("white", "pink", "brown", "babble")
    return {
        "features alone": None,
        **{kind: NoiseSettings(share=1.0, reverb=0.0, kinds=[kind]) for kind in kinds},
        "reverberation": NoiseSettings(share=0.0, reverb=1.0),
        "the defaults": NoiseSettings(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("audio")
    parser.add_argument("--rate", type=int, default=8000)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shards = read_index(Path(arguments.audio))[: arguments.shards]
    wanted = ShardInput(
        folder=arguments.audio, features=FeatureSettings(sample_rate=arguments.rate), max_seconds=60.0, noise_seed=(0,)
    )
    seconds = dict.fromkeys(noises(), float("inf"))
    for _ in range(arguments.passes):
        for name, noise in noises().items():
            start = time.process_time()
            for shard in shards:
                load_features(wanted.model_copy(update={"noise": noise}), shard)
            seconds[name] = min(seconds[name], time.process_time() - start)
    hours = sum(shard.seconds for shard in shards) / 3600
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "audio_hours_per_second": round(hours / spent, 3),
            "ratio_to_features": round(spent / seconds["features alone"], 2),
        }
        for name, spent in seconds.items()
    ]
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
