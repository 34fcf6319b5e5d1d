from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr_kd.distillation.batch import Batch, Example
from asr_kd.errors import UserError
from asr_kd.targets.combine import combine, combine_priors, resample
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import to_text
from asr_kd.targets.store import read_metadata, read_target_shard, tail_prior, write_target_shard
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Cursor, Source
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests import learning
from tests.training.conftest import FEATURES, write_targets

Job = Callable[..., TrainSettings]


@pytest.fixture(scope="session")
def doubtful(tmp_path_factory: pytest.TempPathFactory, audio: str, units: Units) -> str:
    """A second teacher, less sure; its tails are of another shape."""
    folder = tmp_path_factory.mktemp("data") / "doubtful"
    prior = to_text(np.arange(units.size)[::-1].astype(np.uint8) * 4)
    return write_targets(folder, audio, units, doubt=0.3, teacher="fedcba9876543210", tail_prior=prior)


def examples(settings: TrainSettings, units: Units) -> tuple[Source, dict[str, Example]]:
    """One pass over the first source."""
    source = Source(settings, 0, 0, units)
    found = {example.key: example for batch, _ in source.batches(0, Cursor(), 1) for example in batch}
    return source, found


def batches(settings: TrainSettings, units: Units) -> list[Batch]:
    stream = PhaseStream(settings, 0, units)
    stream.passes = 1
    return [batch for batch in stream.batches(stream.start(), 0) if batch is not None]


def contents(folder: str) -> dict[str, SparsePosteriors]:
    return {key: target for path in Path(folder).glob("*.tar") for key, target in read_target_shard(path)[1]}


def same(one: SparsePosteriors | None, other: SparsePosteriors) -> None:
    assert one is not None
    for name in ("counts", "units", "log_probs", "tail"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("mode", ["mean", "log_mean", "confidence", "surest"])
@pytest.mark.parametrize("missing", ["ghost", "prior"])
def test_every_utterance_has_the_combination_of_its_targets(
    job: Job, units: Units, targets: str, doubtful: str, mode: Any, missing: str
) -> None:
    source = {"targets": [targets, doubtful], "combine": {"mode": mode, "weights": [1, 3]}}
    settings = job(source=source, missing_mass=missing)
    read, found = examples(settings, units)
    both = contents(targets), contents(doubtful)
    assert sorted(found) == sorted(both[0]) and (read.met.ends[0].unused, read.met.ends[0].incomplete) == (0, 0)
    shards = {
        key: [(tail_prior(path, metadata), 1 - metadata.statistics.mean_kept_mass) for path, metadata in sets]
        for name in sorted(path.name for path in Path(targets).glob("*.tar"))
        for sets in [[(Path(folder) / name, read_metadata(Path(folder) / name)) for folder in (targets, doubtful)]]
        for key, _ in read_target_shard(Path(targets) / name)[1]
    }
    for key, example in found.items():
        priors, leftover = zip(*shards[key], strict=True)
        with_priors = missing == "prior"
        expected = combine([one[key] for one in both], mode, [1, 3], list(priors) if with_priors else None)
        same(example.targets, expected)
        if with_priors:
            assert example.prior is not None
            np.testing.assert_allclose(example.prior, combine_priors(priors, mode, [1, 3], leftover), rtol=1e-6)
        else:
            assert example.prior is None
    # a batch holds a prior once a shard, as with one teacher
    for batch in batches(settings, units):
        priors = batch.parts.get("soft.priors")
        assert (priors is None) == (missing == "ghost")
        assert priors is None or len(priors.values) <= 3


def test_a_list_of_one_is_the_one(job: Job, units: Units, targets: str) -> None:
    alone, listed = (examples(job(source={"targets": value}), units)[1] for value in (targets, [targets]))
    for key, example in alone.items():
        assert example.targets is not None
        same(listed[key].targets, example.targets)


def test_who_lacks_an_utterance_is_left_out_of_it_and_counted(
    job: Job, units: Units, audio: str, targets: str, doubtful: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = write_targets(tmp_path / "some", audio, units, leave_out=("u2", "u8"))
    fewer = write_targets(tmp_path / "fewer", audio, units, leave_out=("u8",), doubt=0.3)
    source = {"targets": [some, doubtful, fewer], "combine": {"weights": [1, 2, 4]}}
    settings = job(source=source, max_bad_share=0.2, missing_mass="prior", phase={"passes": 1})
    read, found = examples(settings, units)
    assert (read.met.ends[0].unused, read.met.ends[0].incomplete, len(found)) == (0, 2, 10)
    assert read.met.incomplete in {
        ("u2", f"no soft target in {some}"), ("u8", f"no soft target in {some} and {fewer}")
    }  # fmt: skip
    same(found["u8"].targets, contents(doubtful)["u8"])
    name = next(path.name for path in Path(doubtful).glob("*.tar") if "u2" in dict(read_target_shard(path)[1]))
    sets = [Path(folder) / name for folder in (doubtful, fewer)]
    priors = [tail_prior(path, read_metadata(path)) for path in sets]
    same(found["u2"].targets, combine([contents(folder)["u2"] for folder in (doubtful, fewer)], "mean", [2, 4], priors))
    leftover = [1 - read_metadata(path).statistics.mean_kept_mass for path in sets]
    assert found["u2"].prior is not None
    np.testing.assert_allclose(found["u2"].prior, combine_priors(priors, "mean", [2, 4], leftover), rtol=1e-6)

    train(settings)
    assert "2 of 10 utterances cannot be taught by every teacher (first: u" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"2 of 10 utterances cannot be taught by every teacher, more than max_bad_share"
    ):
        train(job(source=source, max_bad_share=0.1, output=str(tmp_path / "strict")))
    nobody = job(source={"targets": [some, fewer]}, max_bad_share=0.2)
    read, found = examples(nobody, units)
    assert (read.met.ends[0].unused, read.met.ends[0].incomplete) == (1, 1) and "u8" not in found
    assert read.met.unused == ("u8", f"no soft target in {some} and {fewer}")
    assert read.met.incomplete == ("u2", f"no soft target in {some}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units_hash": "feedfeedfeedfeed"}, r"other/shard-\d+\.tar: units of the soft targets: feedfeed.*expected here"),
        ({"frame_ms": 40}, r"other/shard-\d+\.tar: frame period in ms of the soft targets: 40, expected here: 30; .*resample"),
        ({"offset_ms": 15}, r"other/shard-\d+\.tar: its first frame begins 15 ms into the audio, the learner's at 0"),
        ({"audio_sha256": "0" * 64}, r"other/shard-\d+\.tar: answers an audio shard with SHA-256 0000.*audio/shard-\d+\.tar has"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("alone", [True, False])
def test_a_set_that_does_not_fit_is_refused(
    job: Job, units: Units, audio: str, targets: str, tmp_path: Path, changes: dict[str, Any], message: str, alone: bool
) -> None:
    other = write_targets(tmp_path / "other", audio, units, **changes)
    with pytest.raises(UserError, match=message):
        examples(job(source={"targets": other if alone else [targets, other]}), units)


def test_frames_are_resampled_where_that_is_asked_for(
    job: Job, units: Units, audio: str, targets: str, tmp_path: Path
) -> None:
    slow = write_targets(tmp_path / "slow", audio, units, doubt=0.2, frame_ms=40, offset_ms=5)
    ours, theirs = contents(targets), contents(slow)
    source = {"targets": [targets, slow], "resample": True}
    for key, example in examples(job(source=source), units)[1].items():
        frames = ours[key].frames
        assert theirs[key].frames < frames
        same(example.targets, combine([ours[key], resample(theirs[key], 40, 5, frames, 30)]))
    for key, example in examples(job(source={"targets": slow, "resample": True}), units)[1].items():
        same(example.targets, resample(theirs[key], 40, 5, ours[key].frames, 30))
    # what is said to be of another period than it is ends elsewhere
    wrong = write_targets(tmp_path / "wrong", audio, units)
    for path in Path(wrong).glob("*.tar"):
        metadata, pairs = read_target_shard(path)
        write_target_shard(path, metadata.model_copy(update={"frame_ms": 60}), list(pairs))
    with pytest.raises(
        UserError, match=r"wrong/shard-\d+\.tar: u\d: its \d+ frames of 60 ms cover 0 to \d+ ms, the \d+ wanted"
    ):
        examples(job(source={"targets": wrong, "resample": True}), units)


def test_a_student_that_hears_less_learns_what_a_teacher_that_hears_all_says(
    job: Job, units: Units, targets: str, tmp_path: Path
) -> None:
    """Audio at half the rate, of which nothing above 2 kHz is left: frames of the same period, and the targets as they are."""
    narrow = {**FEATURES.model_dump(), "sample_rate": 4000, "mels": 9}
    source = {"targets": targets, "resample": True}
    stored, found = contents(targets), examples(job(source=source, features=narrow), units)[1]
    assert sorted(found) == sorted(stored)
    for key, example in found.items():
        assert example.features.shape == (stored[key].frames, 27)
        same(example.targets, stored[key])
    train(job(source=source, features=narrow, phase={"passes": 8, "learning_rate": 0.02}, evaluate_every=50))
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [loss for loss in losses if loss is not None]
    assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5])


def test_log_mean_refuses_teachers_without_a_tail(
    job: Job, units: Units, audio: str, targets: str, tmp_path: Path
) -> None:
    aligned = write_targets(tmp_path / "aligned", audio, units, selection={"mode": "alignment", "hold_frames": 1})
    source = {"targets": [targets, aligned], "combine": {"mode": "log_mean"}}
    with pytest.raises(
        UserError, match=r"aligned/shard-\d+\.tar: mode alignment gives most units no probability.*combine\.mode=mean"
    ):
        examples(job(source=source), units)
    examples(job(source={**source, "combine": {"mode": "confidence"}}), units)


@pytest.mark.parametrize("source", [{}, {"spikes": {}}, {"soft": 0.5, "ctc": 0.5, "ctc_within_targets": True}])
def test_two_teachers_teach_together(
    job: Job, units: Units, audio: str, targets: str, doubtful: str, tmp_path: Path, source: dict[str, Any]
) -> None:
    slow = write_targets(tmp_path / "slow", audio, units, doubt=0.1, frame_ms=60)
    source = {**source, "targets": [targets, doubtful, slow], "resample": True, "combine": {"mode": "confidence"}}
    settings = job(source=source, phase={"passes": 16, "learning_rate": 0.02}, evaluate_every=50)
    train(settings)
    values = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [value["loss"] for value in values if "loss" in value]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    claim = json.loads((tmp_path / "run" / "job.json").read_text())["settings"]
    assert {folder: one["teacher"] for folder, one in claim["teachers"].items()} == {
        targets: "0123456789abcdef", doubtful: "fedcba9876543210", slow: "0123456789abcdef"
    }  # fmt: skip


def test_another_teacher_behind_the_same_path_is_refused(
    job: Job, units: Units, audio: str, targets: str, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    settings = job(source={"targets": [targets, write_targets(second, audio, units)]}, phase={"passes": 1})
    train(settings)
    train(settings)
    for path in second.glob("*.tar"):
        path.unlink()
    second.rmdir()
    write_targets(second, audio, units, teacher="another")
    with pytest.raises(UserError, match=r"run: belongs to other settings .*another"):
        train(settings)


@pytest.mark.parametrize("missing", ["uniform", "ghost", "prior", "renormalise"])
def test_the_loss_on_a_combination_is_the_same_mean_that_it_was_made_of(
    job: Job, units: Units, targets: str, doubtful: str, missing: str
) -> None:
    """Under `uniform` the loss is linear in the target; the others stay finite and within the losses on each."""
    changes = {"missing_mass": missing, "batch_frames": 1000, "bucket_utterances": 10}
    losses = []
    for value in ([targets, doubtful], targets, doubtful):
        settings = job(source={"targets": value}, **changes)
        (batch,) = batches(settings, units)
        losses.append(float(loss_of(batch, settings, units)))
    both, first, second = losses
    if missing == "uniform":
        assert both == pytest.approx((first + second) / 2, rel=1e-5)
    assert min(first, second) - 1e-3 < both < max(first, second) + 1e-3


def loss_of(batch: Batch, settings: TrainSettings, units: Units) -> torch.Tensor:
    logits = torch.randn(*batch.features.shape[:2], units.size, generator=torch.Generator().manual_seed(0)).double()
    return learning.loss_of(logits, batch, settings)
