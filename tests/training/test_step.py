from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from asr_kd.distillation.kind_settings import MwerSettings
from asr_kd.distillation.mwer import expected_word_errors
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model, load_checkpoint
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import follow, step
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.learning import learner_of, loss_of

Job = Callable[..., TrainSettings]


def test_a_block_of_steps_counts_in_the_average_as_so_many_steps(job: Job) -> None:
    settings = job(ema_decay=0.75)
    model = torch.nn.Linear(1, 1)
    learner = learner_of(settings, model)
    learner.average = AveragedModel(learner.pupil)
    follow(learner, 50)  # the first weights are its beginning, however many steps led to them
    before, after = model.weight.item(), model.weight.item() + 1
    torch.nn.init.constant_(model.weight, after)
    follow(learner, 3)
    assert learner.average.module.student.weight.item() == pytest.approx(after + 0.75**3 * (before - after))


FAMILIES: dict[str, dict[str, Any]] = {
    "lstm": {"delay_frames": 2},
    "separable": {"delay_frames": 2},
    "chunked_conformer": {"heads": 2, "chunk_frames": 4, "left_frames": 6},
    "emformer": {"heads": 2, "chunk_frames": 3, "left_frames": 4, "right_frames": 2, "memory": 2},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_chunk_as_long_as_the_utterance_is_the_utterance(job: Job, units: Units, kind: str) -> None:
    model = {"kind": kind, "layers": 2, "size": 12, **FAMILIES[kind]}
    settings = job(
        phase={"chunks": {"frames": 1000, "carry": True}}, batch_frames=1000, bucket_utterances=10, model=model
    )
    plan, whole = settings.phases[0], job(batch_frames=1000, bucket_utterances=10).phases[0]
    stream = PhaseStream(settings, 0, units)
    batch = next(stream.batches(stream.start(), 0))
    assert batch is not None
    weights = []
    for one in (plan, whole):
        torch.manual_seed(0)
        model = build_model(settings.model.model_copy(update={"dropout": 0.0}), settings.features.dimension, units.size)
        carry = one.chunks.frames if one.chunks else None
        loss = step(learner_of(settings, model, 1.0), batch, stream.lessons, 0.1, carry=carry)
        weights.append((loss, model.state_dict()))
    assert weights[0][0] == pytest.approx(weights[1][0])
    for name, value in weights[0][1].items():
        torch.testing.assert_close(value, weights[1][1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("kind", FAMILIES)
def test_carried_chunks_hear_what_was_before(job: Job, units: Units, kind: str, frames: int) -> None:
    model = {"kind": kind, "layers": 2, "size": 12, **FAMILIES[kind]}
    settings = job(
        phase={"chunks": {"frames": frames, "carry": True}}, batch_frames=1000, bucket_utterances=10, model=model
    )
    stream = PhaseStream(settings, 0, units)
    batch = next(stream.batches(stream.start(), 0))
    assert batch is not None
    model = build_model(settings.model.model_copy(update={"dropout": 0.0}), settings.features.dimension, units.size)
    expected = loss_of(model(batch.features, batch.lengths).logits, batch, settings).item()
    loss = step(learner_of(settings, model), batch, stream.lessons, 0.0, carry=frames)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_trainer_adds_it_to_ctc_a_frame(job: Job, audio: str, units: Units) -> None:
    source = {"audio": audio, "targets": None, "soft": 0.0, "ctc": 0.5}
    plain, both = job(source=source), job(source={**source, "mwer": {"hypotheses": 5}})
    stream = PhaseStream(both, 0, units)
    batch = next(stream.batches(stream.start(), 0))
    assert batch is not None
    text = batch.parts["text"]
    logits = torch.randn(*batch.features.shape[:2], units.size, requires_grad=True)
    losses = [loss_of(logits, batch, settings, units) for settings in (plain, both)]
    errors = expected_word_errors(logits, batch.lengths, text, units, MwerSettings(hypotheses=5))
    torch.testing.assert_close(losses[1] - losses[0], errors.sum() / batch.frames)


def test_a_run_ends_in_it_and_can_be_interrupted(
    job: Job, audio: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"audio": audio, "ctc": 1.0}
    last = {"sources": [{**source, "mwer": {"sampled": True}}], "passes": 1, "learning_rate": 0.001}
    phases = [{"sources": [source], "passes": 2, "learning_rate": 0.02}, last]
    whole = job(phases=phases, output=str(tmp_path / "whole"))
    train(whole)
    broken, calls = job(phases=phases, output=str(tmp_path / "broken")), itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 2:
            raise UserError("stopped")
        return expected_word_errors(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("asr_kd.distillation.mwer.expected_word_errors", failing)
        with pytest.raises(UserError, match="stopped"):
            train(broken)
    train(broken)
    assert load_checkpoint(broken.output).fingerprint == load_checkpoint(whole.output).fingerprint


def test_a_network_trains_within_its_targets(job: Callable[..., TrainSettings]) -> None:
    settings = job(
        source={"soft": 0.0, "ctc": 1.0, "ctc_within_targets": True, "augment": {"stretch": 0.1}},
        phase={"passes": 12, "learning_rate": 0.02}, evaluate_every=100,
    )  # fmt: skip
    train(settings)
    text = (Path(settings.output) / "metrics.jsonl").read_text()
    losses = [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"ctc": 0.0, "soft": 1.0, "ctc_within_targets": True}, "needs a ctc weight above 0"),
        ({"ctc": 1.0, "soft": 0.0, "ctc_within_targets": True, "targets": None}, "learns what somebody answers"),
        ({"ctc": 1.0, "soft": 0.0}, "nothing is learned from targets"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    job: Callable[..., TrainSettings], source: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        job(source=source)


def test_missing_targets_are_named(job: Callable[..., TrainSettings], tmp_path: Path) -> None:
    source = {"soft": 0.0, "ctc": 1.0, "ctc_within_targets": True, "targets": str(tmp_path / "none")}
    with pytest.raises(UserError, match="none"):
        train(job(source=source))
