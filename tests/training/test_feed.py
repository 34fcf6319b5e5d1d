from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asr_kd.distillation.batch import Batch
from asr_kd.errors import UserError
from asr_kd.shards.tarset import Sample
from asr_kd.training.batches import PhaseStream
from asr_kd.training.feed import ready_batches
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units
from tests.training.conftest import sample, write_audio

Job = Callable[..., TrainSettings]


def all_of(settings: TrainSettings, units: Units) -> tuple[PhaseStream, list[Batch | None]]:
    stream = PhaseStream(settings, 0, units)
    return stream, list(ready_batches(stream, stream.start(), 0))


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == getattr(other, name).dtype
            assert torch.equal(value, getattr(other, name)), name
        elif name == "parts":
            assert value.keys() == other.parts.keys()
            for part, theirs in zip(value.values(), other.parts.values(), strict=True):
                torch.testing.assert_close(part, theirs, rtol=0, atol=0)
        else:
            assert value == getattr(other, name), name


def test_a_process_makes_the_same_batches_and_says_the_same_at_the_end(job: Job, units: Units, tmp_path: Path) -> None:
    audio = write_audio(
        tmp_path / "odd",
        [[sample("good", "ab", 1)], [Sample("bad", b"no sound", "flac", {"seconds": 1.0, "text": "a"})]],
    )
    labelled = {"audio": audio, "targets": None, "soft": 0.0, "ctc": 1.0, "mwer": {}}
    sources = [job().phases[0].sources[0].model_dump(), labelled]
    settings = job(phase={"passes": 2, "sources": sources}, max_bad_share=0.9, lanes=2)
    thread, held = all_of(settings, units)
    process, sent = all_of(settings.model_copy(update={"loader_workers": 1}), units)
    assert len(sent) == len(held) > 4
    for ours, theirs in zip(held, sent, strict=True):
        assert (ours is None) == (theirs is None)
        if ours and theirs:
            assert_same(ours, theirs)
            assert theirs.features.is_contiguous()
            theirs.features[0] = 0.0  # they can be written to, like those of a thread
    for ours, theirs in zip(thread.sources, process.sources, strict=True):
        assert ours.met == theirs.met
    assert process.sources[1].met.unused[0] == "bad"


def test_a_mistake_in_the_data_is_one_sentence_from_a_process_too(job: Job, units: Units, tmp_path: Path) -> None:
    audio = write_audio(tmp_path / "odd", [[Sample("bad", b"no sound", "flac", {"seconds": 1.0, "text": "a"})]])
    source = {"audio": audio, "targets": None, "soft": 0.0, "ctc": 1.0}
    settings = job(phase={"sources": [source]}, loader_workers=1)
    with pytest.raises(UserError, match=r"none of 1 utterances can be used \(first: bad: "):
        all_of(settings, units)


def test_a_killed_process_is_named_and_leaves_nothing_behind(job: Job, units: Units) -> None:
    settings = job(phase={"passes": 1000}, loader_workers=1)
    stream = PhaseStream(settings, 0, units)
    ready = ready_batches(stream, stream.start(), 0)
    next(ready)
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)  # a scheduler sends it to all processes; the trainer alone decides
    for _ in range(20):
        next(ready)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="was killed, most likely for lack of memory; set loader_workers=0"):
        list(ready)
    assert not multiprocessing.active_children()
