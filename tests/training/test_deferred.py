"""Training with features made on the network's device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from asr_kd.audio.settings import FeatureSettings
from asr_kd.decoding.listening import StreamingNetwork
from asr_kd.distillation.batch import Batch
from asr_kd.models.acoustic import infer, load_checkpoint
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index
from asr_kd.training.batches import PhaseStream
from asr_kd.training.feed import ready_batches
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.training.conftest import RATE, audio_of

Job = Callable[..., TrainSettings]
CPU = torch.device("cpu")
TAUGHT = {"targets": None, "teacher": "average", "soft": 1.0}
MASKED = {"time_masks": 1, "time_frames": 3, "mel_masks": 1, "mel_bands": 3}


def batches(settings: TrainSettings, units: Units, on_device: bool) -> list[Batch]:
    stream = PhaseStream(settings, 0, units, on_device=on_device)
    return [batch for batch in ready_batches(stream, stream.start(), 0) if batch]


def state(settings: TrainSettings) -> bytes:
    return (Path(settings.output) / "last" / "state.safetensors").read_bytes()


@pytest.mark.parametrize("source", [
    {}, {"augment": MASKED}, {"augment": {"stretch": 0.2, "mel_warp": 0.1, **MASKED}}, {"augment": {"noise": {}}},
    {**TAUGHT, "augment": {"stretch": 0.2, "noise": {}, **MASKED}}, {"views": {}, "augment": MASKED},
], ids=str)  # fmt: skip
def test_batches_are_those_of_the_loader_but_for_rounding(job: Job, units: Units, source: dict[str, Any]) -> None:
    # the most there can be comes out of a process, too
    settings = job(source=source, ema_decay=0.5, phase={"passes": 1}, loader_workers=int("teacher" in source))
    here, there = (batches(settings, units, on_device) for on_device in (False, True))
    assert len(here) == len(there) > 2
    for ours, coming in zip(here, there, strict=True):
        assert coming.coming is not None and coming.features.shape == (*ours.features.shape[:2], 0)
        assert torch.equal(coming.learned, ours.learned) and coming.frames == ours.frames
        theirs = coming.to(CPU)
        assert theirs.coming is None
        assert (theirs.clean is None) == (ours.clean is None)
        pairs = [(ours.features, theirs.features)]
        pairs += [(ours.clean, theirs.clean)] if ours.clean is not None and theirs.clean is not None else []
        for one, other in pairs:
            assert one.shape == other.shape and one.dtype == other.dtype
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
            assert torch.equal(one == 0, other == 0) or not source
        assert ours.parts.keys() == theirs.parts.keys()
        for name, part in ours.parts.items():
            torch.testing.assert_close(theirs.parts[name], part, rtol=0, atol=0)
        assert (ours.after, ours.draws, ours.seconds) == (theirs.after, theirs.draws, theirs.seconds)


@pytest.mark.parametrize("carry", [False, True])
def test_a_run_ends_in_the_same_and_can_be_interrupted(
    job: Job, made: list[int], resumed: Callable[..., None], tmp_path: Path, carry: bool
) -> None:
    asked: dict[str, Any] = {
        "source": {"augment": {"stretch": 0.0 if carry else 0.1, **MASKED}},
        "phase": {"passes": 1, "chunks": {"frames": 5, "carry": True} if carry else None},
    }
    whole = job(output=str(tmp_path / "whole"), features_on="device", **asked)
    train(whole)
    assert sum(made) == 10  # the development set is heard as everywhere
    broken = job(output=str(tmp_path / "broken"), features_on="device", **asked)
    resumed(broken)
    assert state(broken) == state(whole)
    loader = job(output=str(tmp_path / "loader"), **asked)
    train(loader)
    there, here = (load_checkpoint(one.output).model.state_dict() for one in (whole, loader))
    for name, weight in here.items():
        torch.testing.assert_close(there[name], weight, rtol=0.05, atol=0.02)


def test_what_is_there_or_cannot_be_made_there_comes_from_the_loader(
    job: Job, units: Units, made: list[int], tmp_path: Path
) -> None:
    for changes in ({"feature_cache": str(tmp_path / "cache")}, {"phase": {"chunks": {"frames": 4, "left": 1}}}):
        settings = job(**changes)
        for ours, theirs in zip(batches(settings, units, False), batches(settings, units, True), strict=True):
            assert theirs.coming is None and torch.equal(ours.features, theirs.features)
    assert not made


def test_nothing_is_written_of_a_setting_that_is_not_used(job: Job) -> None:
    assert "features_on" not in job().model_dump()
    assert "kind" not in job().model_dump()["features"]
    assert job(features_on="loader").model_dump()["features_on"] == "loader"


@pytest.mark.parametrize(("changes", "message"), [
    ({"feature_cache": "cache"}, "feature_cache keeps those of the loader; leave one of them out"),
    ({"phase": {"chunks": {"frames": 4}}}, "chunks without carry are stretches of them; leave it out"),
], ids=["cache", "chunks"])  # fmt: skip
def test_what_does_not_go_together_is_refused(job: Job, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        job(features_on="device", **changes)


@pytest.mark.parametrize("where", ["loader", "device"])
def test_a_student_of_kaldis_features_learns_and_streams(job: Job, audio: str, made: list[int], where: str) -> None:
    features = FeatureSettings(kind="kaldi", sample_rate=RATE, mels=8, stack=4)
    source = {"audio": audio, "targets": None, "soft": 0.0, "ctc": 1.0}
    settings = job(
        features=features.model_dump(), source=source, phase={"passes": 15}, features_on=where, batch_frames=60,
        model={"layers": 2, "size": 24, "delay_frames": 1}, evaluate_every=100,
    )  # fmt: skip
    train(settings)
    assert bool(made) == (where == "device")
    best = load_checkpoint(settings.output)
    assert best.features == features and best.frame_ms == 40
    first = json.loads((Path(settings.output) / "metrics.jsonl").read_text().splitlines()[0])
    assert best.training["development_loss"] < 0.85 * first["development_loss"]
    wanted = ShardInput(folder=audio, features=features, max_seconds=60.0)
    heard = {item.key: item.features for info in read_index(audio) for item in load_features(wanted, info).items}
    for key, waveform in audio_of(audio).items():
        stream = StreamingNetwork(best)
        found = [*(stream.push(part) for part in np.array_split(waveform, 7)), stream.finish()]
        np.testing.assert_allclose(np.concatenate(found), infer(best, [heard[key]])[0], atol=1e-3)
