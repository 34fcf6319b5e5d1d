"""Mode hidden: what is stored is what the teacher's layers say, and it is stored exactly once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from asr_kd.audio.decode import decode as decode_audio
from asr_kd.audio.features import Frontend
from asr_kd.errors import UserError
from asr_kd.labeling import hidden as hidden_module
from asr_kd.labeling import job as job_module
from asr_kd.labeling.hidden import make_quantiser
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import load_checkpoint, log_posteriors_and_hidden, save_checkpoint
from asr_kd.shards.tarset import read_index, read_shard
from asr_kd.targets.hidden import HiddenStates, decode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import FILE, read_quantiser
from asr_kd.targets.store import read_labelled_shard, read_metadata, read_target_shard

Job = Callable[..., LabelSettings]
HIDDEN: dict[str, Any] = {"mode": "hidden", "taps": ["layer.1"], "k": 8, "mass": 0.99}
CODES: dict[str, Any] = HIDDEN | {"keep": "codes", "codebooks": 3, "quantiser_frames": 300}
KEEPS = {"events": HIDDEN | {"keep": "events"}, "frames": HIDDEN | {"keep": "frames"}, "codes": CODES}


def published(folder: str | Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in Path(folder).iterdir()
        if path.name not in ("timing.json", "summary.json")
    }


def shards_of(settings: LabelSettings) -> list[tuple[Path, dict[str, tuple[SparsePosteriors, HiddenStates]]]]:
    """For each audio shard what is stored of its utterances."""
    quantiser = read_quantiser(settings.output) if settings.keep == "codes" else None
    found = []
    for info in read_index(Path(settings.audio)):
        path = Path(settings.output) / info.name
        metadata, utterances = read_labelled_shard(path)
        assert metadata.hidden is not None
        states = {
            one.key: (one.target, decode_hidden(one.hidden or b"", metadata.hidden, one.key, quantiser))
            for one in utterances
        }
        found.append((path, states))
    return found


@pytest.mark.parametrize("keep", KEEPS)
def test_what_is_stored_is_what_the_layer_says(job: Job, tmp_path: Path, keep: str) -> None:
    settings = job(**KEEPS[keep])
    label(settings)
    plain = job(k=8, mass=0.99, output=str(tmp_path / "plain"))
    label(plain)
    teacher, events = load_checkpoint(settings.teacher), 0
    for path, states in shards_of(settings):
        described = read_metadata(path).hidden
        assert described is not None and described.taps == {"layer.1": 16}
        lost = square = 0.0
        every = []
        for sample in read_shard(Path(settings.audio) / path.name):
            waveform, _ = decode_audio(sample.audio, sample.key, 8000, 60.0)
            features = Frontend(teacher.features).compute(waveform).astype(np.float16)
            ((_, layers),) = log_posteriors_and_hidden(teacher, [features], ["layer.1"])
            target, stored = states[sample.key]
            expected, got = layers["layer.1"].numpy().astype(np.float64), stored.of_frames("layer.1")
            if keep == "events":
                assert stored.edges is not None
                expected = naive_events(target, expected)
                got = np.stack([got[start] for start, _ in stored.edges.T]) if len(expected) else got[:0]
                events += len(expected)
            assert got.shape == expected.shape
            if keep != "codes":
                np.testing.assert_allclose(got, expected, atol=2e-3)
            lost, every = lost + float(np.square(got - expected).sum()), [*every, expected]
        rows = np.concatenate(every)
        square = float(np.square(rows - rows.mean(0)).sum())
        assert described.rows == len(rows)
        assert described.lost["layer.1"] == pytest.approx(lost / square, rel=0.05, abs=1e-7)
        assert described.lost["layer.1"] < (0.5 if keep == "codes" else 1e-5)  # few frames for its quantiser
        # the soft targets are those of a job without hidden states
        for (key, target), (other, theirs) in zip(read_target_shard(path)[1], read_target_shard(Path(plain.output) / path.name)[1], strict=True):  # fmt: skip
            assert key == other
            np.testing.assert_array_equal(target.log_probs, theirs.log_probs)
    assert keep != "events" or events > 5
    report = json.loads((Path(settings.output) / "report.json").read_text())
    assert report["hidden"]["keep"] == keep and 0 <= report["hidden"]["lost"]["layer.1"] < 0.5
    per_frame = {"frames": 32, "codes": 3, "events": 16}[keep]
    assert per_frame / 20 < report["hidden"]["bytes_per_frame"] < per_frame + 3


def naive_events(target: SparsePosteriors, states: np.ndarray) -> np.ndarray:
    """Each spike's states, weighted by what is no blank."""
    units, probs = target.padded(8)
    mass = np.where(units != 0, probs, 0).sum(1)
    best = np.where(units != 0, probs, 0).argmax(1)
    unit = units[np.arange(len(units)), best]
    found: list[list[int]] = []
    sure = None
    for frame in range(len(units)):
        if mass[frame] < 0.1:
            sure = None
            continue
        apart = mass[frame] > 0.5 and sure is not None and sure != unit[frame]
        if frame == 0 or mass[frame - 1] < 0.1 or apart:
            found.append([])
        if mass[frame] > 0.5:
            sure = unit[frame]
        found[-1].append(frame)
    rows = [np.average(states[frames], axis=0, weights=mass[frames] + 1e-6) for frames in found]
    return np.stack(rows) if rows else states[:0]


@pytest.mark.parametrize("keep", ["events", "codes"])
def test_stopped_and_started_again_it_ends_in_the_same_bytes(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    label(job(output=str(tmp_path / "whole"), loader_workers=int(keep == "events"), **KEEPS[keep]))
    settings, real = job(**KEEPS[keep]), job_module.label_shard

    def stopped(*arguments: Any) -> Any:
        if (Path(settings.output) / "shard-000000.tar").exists():
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job_module, "label_shard", stopped)
        label(settings)
    with monkeypatch.context() as patch:
        patch.setattr(hidden_module, "fit", None)  # the quantiser is there
        label(settings)
    assert published(settings.output) == published(tmp_path / "whole")
    label(settings)
    assert published(settings.output) == published(tmp_path / "whole")


FORK = get_context("fork")


@pytest.mark.parametrize("killed", [False, True])
def test_several_processes_train_one_quantiser(job: Job, tmp_path: Path, killed: bool) -> None:
    settings = job(**CODES)
    teacher, infos = load_checkpoint(settings.teacher), read_index(settings.audio)
    Path(settings.output).mkdir()
    log = tmp_path / "log"

    def work(dies: bool) -> None:
        real = hidden_module.fit

        def noted(*arguments: Any) -> Any:
            with open(log, "a") as file:
                file.write("fit\n")
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        hidden_module.fit = noted
        make_quantiser(settings, teacher, infos)

    if killed:
        first = FORK.Process(target=work, args=(True,))
        first.start()
        first.join(300)
        assert not (Path(settings.output) / FILE).exists()
    processes = [FORK.Process(target=work, args=(False,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert len(log.read_text().split()) == 1 + killed
    alone = job(output=str(tmp_path / "alone"), **CODES)
    Path(alone.output).mkdir()
    make_quantiser(alone, teacher, infos)
    assert published(settings.output) == published(alone.output)


def test_other_settings_are_another_job(job: Job) -> None:
    label(job(**HIDDEN))
    with pytest.raises(UserError, match=r"belongs to other settings \(hidden\.keep was \"events\", now \"frames\"\)"):
        label(job(**KEEPS["frames"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": []}, "mode hidden needs taps"),
        ({"taps": ["layer.1", "layer.1"]}, r"taps names layer\.1 twice"),
        ({"mode": "mass"}, "taps belongs to mode hidden alone"),
        ({"codebooks": 4}, "codebooks belongs to keep codes alone"),
        ({"draws": 4}, "draws belongs to mode sampled alone"),
    ],
)
def test_what_does_not_go_together(job: Job, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        job(**HIDDEN | changes)


def test_a_layer_that_the_teacher_lacks_is_named(job: Job) -> None:
    with pytest.raises(UserError, match=r"taps: .* has no layer\.7; it has layer\.1"):
        label(job(**HIDDEN | {"taps": ["layer.7"]}))


def test_states_that_float16_does_not_hold_are_refused(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = hidden_module.kept_hidden

    def larger(settings: Any, states: dict[str, torch.Tensor], *rest: Any) -> Any:
        return real(settings, {tap: 1e6 * rows for tap, rows in states.items()}, *rest)

    monkeypatch.setattr("asr_kd.labeling.shard.kept_hidden", larger)
    with pytest.raises(UserError, match=r"shard-000000\.tar: s0-u\d: the hidden states of layer\.1 are too large"):
        label(job(**KEEPS["frames"]))


def test_an_utterance_without_spikes(job: Job, teacher: Path, tmp_path: Path) -> None:
    silent = load_checkpoint(teacher)
    with torch.no_grad():
        silent.model.output.bias[0] = 100.0
    save_checkpoint(tmp_path / "silent", silent.model, silent.units, silent.features, silent.settings)
    settings = job(teacher=str(tmp_path / "silent"), **HIDDEN)
    label(settings)
    for path, states in shards_of(settings):
        described = read_metadata(path).hidden
        assert described is not None and (described.rows, described.lost) == (0, {"layer.1": 0.0})
        assert all(
            not one.of_frames("layer.1").any() and one.frames == target.frames for target, one in states.values()
        )
