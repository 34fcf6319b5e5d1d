"""A teacher of one's own, from Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.labeling.write import write_targets
from asr_kd.models.acoustic import infer, load_checkpoint
from asr_kd.shards.tarset import Sample, read_index, write_index, write_shard
from asr_kd.targets.store import read_metadata, read_target_shard
from asr_kd.units import Units
from tests.labeling.conftest import FEATURES

Job = Callable[..., LabelSettings]


def random(key: str, units: int, frames: int = 7) -> np.ndarray:
    """Log-probabilities that depend on the key alone."""
    rng = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
    return np.log(rng.dirichlet(np.full(units, 0.1), frames) + 1e-9)


def write(audio: Path, output: Path, units: Units, answers: Any = None, **changes: Any) -> None:
    def all_of(samples: list[Sample]) -> Iterable[tuple[str, Any]]:
        return [(sample.key, random(sample.key, units.size)) for sample in reversed(samples)]

    given: dict[str, Any] = {"teacher": "mine-1", "units": units, "frame_ms": 30}
    write_targets(audio, output, answers or all_of, **given | changes)


def test_with_our_own_teacher_it_writes_what_label_writes(job: Job, audio: Path, teacher: Path, tmp_path: Path) -> None:
    settings = job()
    label(settings)
    mine = load_checkpoint(teacher, torch.device("cpu"))

    def answers(samples: list[Sample]) -> Iterable[tuple[str, torch.Tensor]]:
        for sample in samples:
            waveform, _ = decode(sample.audio, sample.key, FEATURES.sample_rate, 60.0)
            yield sample.key, torch.as_tensor(next(iter(infer(mine, [Frontend(FEATURES).compute(waveform)]))))

    more = {"k": settings.k, "mass": settings.mass, "features": FEATURES, "frame_ms": mine.frame_ms}
    write(audio, tmp_path / "mine", mine.units, answers, teacher=mine.fingerprint, **more)
    for info in read_index(audio):
        theirs, targets = read_target_shard(tmp_path / "targets" / info.name)
        ours, found = read_target_shard(tmp_path / "mine" / info.name)
        same = {"members", "statistics", "tail_prior", "heard"}  # the network rounds otherwise in other batches
        assert ours.model_dump(exclude=same) == theirs.model_dump(exclude=same)
        assert ours.statistics.frames == theirs.statistics.frames
        for (key, one), (other, two) in zip(targets, found, strict=True):
            assert key == other and one.frames == two.frames
            dense = [np.zeros((one.frames, one.num_units)) for _ in range(2)]
            for values, each in zip(dense, (one, two), strict=True):
                values[each.rows, each.units] = np.exp(each.log_probs)
            np.testing.assert_allclose(*dense, atol=0.03)


def test_what_is_read_is_what_was_said(audio: Path, units: Units, tmp_path: Path) -> None:
    write(audio, tmp_path / "t", units, mass=1.0, k=255, offset_ms=15)
    for info in read_index(audio):
        metadata, targets = read_target_shard(tmp_path / "t" / info.name, units.hash, units.size, 30)
        assert (metadata.teacher, metadata.offset_ms, metadata.audio_sha256) == ("mine-1", 15, info.sha256)
        assert metadata.statistics.audio_seconds == pytest.approx(info.seconds)
        for key, target in targets:
            wanted = np.exp(random(key, units.size))
            found = np.zeros_like(wanted)
            found[target.rows, target.units] = np.exp(target.log_probs)
            np.testing.assert_allclose(found, wanted / wanted.sum(1, keepdims=True), atol=0.02)


def test_killed_in_any_shard_it_goes_on_with_the_same_bytes(audio: Path, units: Units, tmp_path: Path) -> None:
    write(audio, tmp_path / "whole", units)
    asked: list[str] = []

    def killed(samples: list[Sample]) -> Iterable[tuple[str, Any]]:
        asked.append(samples[0].key)
        for sample in samples:
            if len(asked) in (1, 3) and sample is samples[-1]:
                raise KeyboardInterrupt
            yield sample.key, random(sample.key, units.size)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write(audio, tmp_path / "t", units, killed)
    write(audio, tmp_path / "t", units, killed)
    assert len(asked) == 5 and len(set(asked)) == 3
    names = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_has_no_answer_is_quarantined_with_its_reason(audio: Path, units: Units, tmp_path: Path) -> None:
    def some(samples: list[Sample]) -> Iterable[tuple[str, Any]]:
        yield from ((one.key, "too long" if one.key == "s1-u2" else random(one.key, units.size)) for one in samples)

    with pytest.raises(UserError, match=r"1 of 12 utterances cannot be labelled, .*\(first: s1-u2: too long\)"):
        write(audio, tmp_path / "t", units, some)
    write(audio, tmp_path / "t", units, some, max_bad_share=0.1)
    assert read_metadata(tmp_path / "t" / "shard-000001.tar").quarantined == {"s1-u2": "too long"}
    lines = (tmp_path / "t" / "quarantine.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [{"key": "s1-u2", "shard": "shard-000001.tar", "reason": "too long"}]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (lambda keys, good: zip(keys[1:], good, strict=False), r"1 utterances have no answer \(first: s0-u0\)"),
        (lambda keys, good: [(keys[0], good[0])] * 2, "'s0-u0' is answered twice"),
        (lambda keys, good: [("other", good[0])], "'other' is no utterance of shard-000000.tar"),
        (lambda keys, good: [(keys[0], good[0][:, 1:])], r"s0-u0: an answer of shape \(7, \d+\); give \[frames, "),
        (lambda keys, good: [(keys[0], good[0][0])], r"an answer of shape \(\d+,\)"),
        (lambda keys, good: [(keys[0], good[0][:0])], r"an answer of shape \(0, \d+\)"),
        (lambda keys, good: [(keys[0], good[0] + 1)], "s0-u0: the probabilities of frame 0 do not add up to 1"),
        (lambda keys, good: [(keys[0], good[0] * np.nan)], "s0-u0: the probabilities of frame 0 do not add up to 1"),
    ],
)
def test_answers_that_are_none_are_named(
    audio: Path, units: Units, tmp_path: Path, said: Callable[..., Any], message: str
) -> None:
    def answers(samples: list[Sample]) -> Iterable[tuple[str, Any]]:
        return said([one.key for one in samples], [random(one.key, units.size) for one in samples])

    with pytest.raises(UserError, match=rf"^shard-000000\.tar: .*{message}"):
        write(audio, tmp_path / "t", units, answers)
    assert not list((tmp_path / "t").glob("*.tar"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": " "}, "teacher: ' ' marks no teacher"),
        ({"frame_ms": 0}, "frame_ms: input should be greater"),
        ({"k": 256}, "k is 1 to 255"),
        ({"mass": 0.0}, "mass above 0"),
        ({"floor": 1.0}, "floor from 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    audio: Path, units: Units, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write(audio, tmp_path / "t", units, **changes)
    assert not (tmp_path / "t").exists()


def test_answers_of_another_teacher_are_not_mixed_in(audio: Path, units: Units, tmp_path: Path) -> None:
    write(audio, tmp_path / "t", units)
    with pytest.raises(UserError, match=r'belongs to other settings \(teacher was "mine-1", now "mine-2"\)'):
        write(audio, tmp_path / "t", units, teacher="mine-2")


def test_a_shard_without_utterances(units: Units, tmp_path: Path) -> None:
    samples = [Sample("a", b"", "wav", {"seconds": 1.0})]
    write_index(tmp_path, [write_shard(tmp_path / f"{number}.tar", samples[number:]) for number in range(2)])
    write(tmp_path, tmp_path / "t", units)
    assert [key for key, _ in read_target_shard(tmp_path / "t" / "0.tar")[1]] == ["a"]
    assert not list(read_target_shard(tmp_path / "t" / "1.tar")[1])
