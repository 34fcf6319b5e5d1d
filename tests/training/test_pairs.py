"""Targets that answer another recording of the same moments."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_kd.audio.decode import decode
from asr_kd.config.load import build
from asr_kd.distillation.batch import Example
from asr_kd.errors import UserError
from asr_kd.shards.tarset import Sample, read_index, read_shard
from asr_kd.targets.store import read_target_shard
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.training.conftest import write_audio, write_targets
from tests.training.test_sources import MIXED, contents, whole_job
from tests.training.test_trainer import published

Job = Callable[..., TrainSettings]


def moved(one: Sample, ms: float) -> Sample:
    """The same with so much silence in front, or without so much of its start."""
    sound, rate = decode(one.audio, one.key, None, 60.0)
    steps = round(ms * rate / 1000)
    sound = np.concatenate([np.zeros(steps, np.float32), sound]) if steps > 0 else sound[-steps:]
    data = io.BytesIO()
    soundfile.write(data, sound, rate, format="FLAC")
    return dataclasses.replace(one, audio=data.getvalue(), fields={**one.fields, "seconds": len(sound) / rate})


def samples(audio: str) -> list[tuple[str, str, Sample]]:
    """Shard, its SHA-256 and utterance, of all."""
    return [(info.name, info.sha256, one) for info in read_index(audio) for one in read_shard(Path(audio) / info.name)]


def pairs(path: Path, theirs: str, audio: str, offset: float, without: tuple[str, ...] = (), **changes: Any) -> str:
    """Pairs of all utterances but some; `changes` are of its first line."""
    heard = {one.key: (shard, sha256) for shard, sha256, one in samples(theirs)}
    lines = []
    for shard, _, one in samples(audio):
        line = {"key": one.key, "kept": one.key not in without, "set": read_index(audio).hash, "shard": shard}
        line |= {"seconds": one.fields["seconds"], "offset_ms": offset}
        lines.append(line | dict(zip(("heard", "heard_sha256"), heard[one.key], strict=True)))
    lines[0] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def shifted(folder: Path, audio: str, ms: float) -> str:
    """The same moments, later, in other shards and another order."""
    later = [moved(one, ms) for _, _, one in reversed(samples(audio))]
    return write_audio(folder, [later[:2], later[2:9], later[9:]])


def examples(settings: TrainSettings, units: Units) -> dict[str, Example]:
    source = PhaseStream(settings, 0, units).sources[0]
    return {one.key: one for reading in source._readings(0, PhaseStream(settings, 0, units).start()[0].cursors[0], 1) for one in reading.examples}  # fmt: skip


@pytest.mark.parametrize(("ms", "frames"), [(37.0, 1), (60.0, 2), (-50.0, -2), (10.0, 0)])
def test_the_targets_of_a_shifted_copy_line_up(
    ms: float, frames: int, job: Job, units: Units, audio: str, targets: str, tmp_path: Path
) -> None:
    later = shifted(tmp_path / "later", audio, ms)
    settings = job(source={"audio": later, "pairs": pairs(tmp_path / "pairs.jsonl", audio, later, ms)}, **MIXED)
    given = {key: one for path in Path(targets).glob("*.tar") for key, one in read_target_shard(path)[1]}
    texts = {one.key: one.fields["text"] for _, _, one in samples(later)}
    found = examples(settings, units)
    assert len(found) == 10
    for key, example in found.items():
        assert example.targets is not None
        wanted = np.clip(np.arange(len(example.features)) - frames, 0, given[key].frames - 1)
        ours, theirs = example.targets.padded(3), given[key].padded(3)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other[wanted])
        # the units lie where their tones are in the later recording, to within a frame: every second 240 ms from the moved start on
        best = ours[0][:, 0]
        for number, letter in enumerate(texts[key]):
            middle = (240 * (2 * number + 1) + 120 + ms) / 30
            assert {int(best[round(middle) + step]) for step in (-1, 0, 1)} == {units.encode(letter)[-1]}
        edges = np.flatnonzero(np.diff(best))
        starts = np.arange(1, 2 * len(texts[key]) + 1) * 240 + ms
        assert len(edges) == len(starts) and np.abs((edges + 1) * 30 + 12.5 - starts).max() <= 30


def test_pairs_without_an_offset_change_no_bit(
    job: Job, audio: str, targets: str, units: Units, tmp_path: Path
) -> None:
    same = pairs(tmp_path / "pairs.jsonl", audio, audio, 0.0)
    for changes in ({}, {"lanes": 3}, {"missing_mass": "prior"}):
        with_pairs, without = job(source={"pairs": same}, **MIXED, **changes), job(**MIXED, **changes)
        batches = [whole_job(one, units) for one in (with_pairs, without)]
        assert contents(batches[0]) == contents(batches[1])
        for one, other in zip(*batches, strict=True):
            assert one.parts.keys() == other.parts.keys()
            for name in one.parts:
                if name not in ("soft.prior", "soft.priors"):
                    np.testing.assert_array_equal(one.parts[name].values, other.parts[name].values)
    train(job(source={"pairs": same}, output=str(tmp_path / "with")))
    train(job(output=str(tmp_path / "without")))
    with_pairs, without = (published(tmp_path / name) for name in ("with", "without"))
    assert with_pairs["last/state.safetensors"] == without["last/state.safetensors"]
    claim = json.loads((tmp_path / "without" / "job.json").read_text())["settings"]
    assert "pairs" not in claim["phases"][0]["sources"][0] and "lists" not in claim


def test_several_teachers_answer_and_the_refused_are_left_out(
    job: Job, units: Units, audio: str, targets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = write_targets(tmp_path / "second", audio, units, doubt=0.2)
    later = shifted(tmp_path / "later", audio, 37.0)
    file = pairs(tmp_path / "pairs.jsonl", audio, later, 37.0, without=("u3", "u4"))
    source = {"audio": later, "pairs": file, "targets": [targets, second]}
    for missing in ("ghost", "prior"):
        assert len(examples(job(source=source, missing_mass=missing), units)) == 8
    train(job(source={**source, "spikes": {}}))
    assert f"8 utterances are kept by {file}" in (said := capsys.readouterr().err) and "2 are left out" in said


def test_pairs_that_do_not_fit_are_refused(job: Job, units: Units, audio: str, targets: str, tmp_path: Path) -> None:
    later, close = shifted(tmp_path / "later", audio, 37.0), audio

    def refused(message: str, audio: str = later, **changes: Any) -> None:
        file = pairs(tmp_path / "pairs.jsonl", close, later, 37.0, **changes)
        with pytest.raises(UserError, match=message):
            whole_job(job(source={"audio": audio, "pairs": file}), units)

    with pytest.raises(UserError, match=r"answers an audio shard .*give `pairs` of `asr-kd pair`"):
        whole_job(job(source={"audio": later}), units)
    refused("line 1: offset_ms is None; make the list with `asr-kd pair`", offset_ms=None)
    refused("line 1: heard is 3; make", heard=3)
    for name, value in (("heard", "../x.tar"), ("offset_ms", 1e300), ("offset_ms", True)):
        refused(f"line 1: {name} is .*; make the list with", **{name: value})
    refused(r"speaks of other audio .* run `asr-kd pair`", audio=audio)
    refused(r"answers an audio shard with SHA-256 .*pairs.jsonl: shard-000002.tar has 0000", heard_sha256="0" * 64)
    nobody = tuple(f"u{one}" for one in range(10))
    refused("keeps none of the utterances of .*; ask less of `asr-kd pair`", without=nobody)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"targets": None, "soft": 0.0, "ctc": 1.0}, "pairs say which other recordings the targets answer; give targets"),
        ({"only": "list.jsonl"}, "pairs already name the utterances to learn from"),
        ({"features": [{"student": "layer.1", "teacher": "layer.1"}]}, "pairs move soft targets alone, not hidden states"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(job: Job, source: dict[str, Any], message: str) -> None:
    values = job().model_dump()
    values["phases"][0]["sources"][0] |= {"pairs": "pairs.jsonl", **source}
    with pytest.raises(UserError, match=message):
        build(TrainSettings, values, "run.yaml")
