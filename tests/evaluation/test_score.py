from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import pytest

from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import UserError
from asr_kd.evaluation.beside import load_shard
from asr_kd.evaluation.parts import Shard
from asr_kd.evaluation.score import System, score
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.shards.tarset import read_index


@pytest.fixture
def systems(checkpoints: dict[str, Path]) -> list[System]:
    return [System(name, folder, load_checkpoint(folder)) for name, folder in checkpoints.items()]


@pytest.fixture
def settings(checkpoints: dict[str, Path], audio: Path) -> EvalSettings:
    systems = {name: str(folder) for name, folder in checkpoints.items()}
    return EvalSettings(systems=systems, audio=str(audio), output="-", teacher="teacher", device="cpu")


def shards_of(folder: Path | str) -> list[Shard]:
    return [Shard("test", str(folder), info) for info in read_index(folder)]


def test_memory_does_not_grow_with_the_number_of_shards(
    settings: EvalSettings, systems: list[System], audio: Path
) -> None:
    def peak(times: int) -> int:
        tracemalloc.start()
        for _ in score(settings, systems, shards_of(audio)[:1] * times):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak(1)
    assert peak(30) < 1.2 * peak(3)


def test_shards_are_asked_for_one_by_one(settings: EvalSettings, systems: list[System], audio: Path) -> None:
    """What is not begun yet is free for other processes."""
    asked = []
    scored = score(settings, systems, (asked.append(shard) or shard for shard in shards_of(audio)))
    next(scored)
    assert len(asked) == 1
    scored.close()


def test_what_it_took_is_said_of_each_system(settings: EvalSettings, systems: list[System], audio: Path) -> None:
    for shard, part, costs in score(settings, systems, shards_of(audio)):
        assert part.utterances == shard.info.samples
        assert part.seconds == pytest.approx(shard.info.seconds)
        assert list(costs) == ["teacher", "student"]
        for system in costs.values():
            assert system.seconds == part.seconds
            assert all(seconds > 0 for seconds in dataclasses.astuple(system))


def test_one_utterance_scored_alone_or_among_others_has_the_same_line(
    settings: EvalSettings, systems: list[System], audio: Path
) -> None:
    def lines(batch_frames: int) -> list[str]:
        changed = settings.model_copy(update={"batch_frames": batch_frames})
        found = [line for _, part, _ in score(changed, systems, shards_of(audio)) for line in part.lines]
        return [json.dumps({**line, "times": [time[:3] for time in line["times"]]}) for line in found]

    assert lines(1) == lines(4000)


def test_what_is_no_scalar_stays_behind(settings: EvalSettings, systems: list[System], sets: dict[str, str]) -> None:
    (_, part, _), *_ = score(settings, systems, shards_of(sets["noisy"])[:1])
    assert [line["fields"] for line in part.lines][:2] == [{"snr": 6}, {"snr": 7}]


def test_an_index_that_counts_otherwise(audio: Path) -> None:
    shard = shards_of(audio)[0]
    more = dataclasses.replace(shard, info=dataclasses.replace(shard.info, samples=3))
    with pytest.raises(UserError, match=r"shard-000000\.tar: index\.json counts 3 utterances, the shard holds 2"):
        load_shard({"any": FeatureSettings()}, 60.0, more)
