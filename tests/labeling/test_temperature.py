from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from asr_kd.audio.decode import decode as decode_audio
from asr_kd.audio.features import Frontend
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import infer, load_checkpoint
from asr_kd.shards.tarset import read_index
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import read_metadata
from tests.joining import join

Job = Callable[..., LabelSettings]


def labelled(settings: LabelSettings) -> Iterator[tuple[np.ndarray, SparsePosteriors]]:
    """The teacher's logits (up to a constant a frame, which no softmax sees) and the targets of every utterance."""
    label(settings)
    teacher = load_checkpoint(settings.teacher)
    for info in read_index(Path(settings.audio)):
        for sample, target in join(Path(settings.audio) / info.name, Path(settings.output) / info.name):
            waveform, _ = decode_audio(sample.audio, sample.key, teacher.features.sample_rate, 60.0)
            yield infer(teacher, [Frontend(teacher.features).compute(waveform)])[0], target


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0])
def test_targets_are_the_teachers_softmax_at_the_temperature(job: Job, temperature: float) -> None:
    # all units are kept, so that only rounding is between the two
    for logits, target in labelled(job(temperature=temperature, k=255, mass=1.0)):
        expected = torch.from_numpy(logits).double().div(temperature).softmax(-1).numpy()
        dense = np.zeros_like(expected)
        dense[np.repeat(np.arange(target.frames), target.counts), target.units] = np.exp(target.log_probs)
        np.testing.assert_allclose(dense, expected, atol=0.03)
        assert abs(dense - expected).mean() < 0.003


def test_higher_is_softer(job: Job, tmp_path: Path) -> None:
    reports = []
    for temperature in (0.5, 1.0, 2.0):
        settings = job(temperature=temperature, output=str(tmp_path / str(temperature)))
        best = [target.padded(1)[1] for _, target in labelled(settings)]
        report = json.loads((Path(settings.output) / "report.json").read_text())
        assert report["top1_kept"] == 1.0 and report["mean_kl"] < 0.2, "measured against the softened teacher"
        reports.append((float(np.concatenate(best).mean()), -report["entries_per_frame"]))
    assert reports == sorted(reports, reverse=True)


def test_it_is_recorded_and_one_changes_no_byte(job: Job, tmp_path: Path) -> None:
    contents = []
    for name, changes in (("plain", {}), ("one", {"temperature": 1.0}), ("two", {"temperature": 2.0})):
        settings = job(output=str(tmp_path / name), **changes)
        label(settings)
        contents.append({path.name: path.read_bytes() for path in sorted(Path(settings.output).glob("*.tar"))})
        for shard in contents[-1]:
            selection = read_metadata(Path(settings.output) / shard).selection
            assert selection.temperature == changes.get("temperature", 1.0)
    assert contents[0] == contents[1] and contents[0] != contents[2]


def test_another_one_is_other_settings(job: Job) -> None:
    label(job(temperature=2.0))
    with pytest.raises(UserError, match=r"belongs to other settings \(temperature was 2\.0, now 3\.0\)"):
        label(job(temperature=3.0))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_none_is_refused(job: Job, temperature: float) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        job(temperature=temperature)
