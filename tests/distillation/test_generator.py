"""A generator's loss: which slope reaches whom, its distance from moments, and the band of the teacher's speech."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asr_kd.distillation.answers import answer, answerers
from asr_kd.distillation.generator import Generator, distance, divergence, log_spoken, reversed_slope
from asr_kd.distillation.knowledge import MADE, Pupil
from asr_kd.models.acoustic import build_model, load_checkpoint
from asr_kd.targets.moments import Moments, Sums, write_moments
from asr_kd.training.batches import PhaseStream
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner, _loss
from asr_kd.units import Units
from tests.training.conftest import FEATURES
from tests.training.test_critic import teacher

__all__ = ["teacher"]
Job = Callable[..., TrainSettings]


def moments_of(seed: int, spoken: float = 0.2, fingerprint: str = "") -> Moments:
    rng = np.random.default_rng(seed)
    sums = Sums(FEATURES.dimension)
    rows = rng.normal(size=(200, FEATURES.dimension)) @ rng.normal(size=(FEATURES.dimension, FEATURES.dimension)) / 5
    sums.add((rows[1:] + rows[:-1]).astype(np.float16), spoken * 199)
    return sums.moments(fingerprint)


class Scene:
    """A batch of what is drawn for a generator, and everybody who learns or answers."""

    def __init__(
        self, job: Job, units: Units, teacher: str, folder: Path, spoken: float = 0.2, **generated: Any
    ) -> None:
        self.moments = moments_of(1, spoken, load_checkpoint(teacher).fingerprint)
        write_moments(folder / "moments", self.moments)
        asked = {
            "kind": "adversarial",
            "utterances": 6,
            "seconds": 0.6,
            "moments": str(folder / "moments"),
            **generated,
        }
        source = {"audio": None, "targets": None, "teacher": teacher, "generated": asked, "soft": 0.7}
        self.settings = job(source=source)
        self.stream = PhaseStream(self.settings, 0, units)
        self.lesson = self.stream.lessons[0]
        batch = next(self.stream.batches(self.stream.start(), 0))
        assert batch is not None
        self.batch = batch
        torch.manual_seed(3)
        self.student = build_model(self.settings.model, FEATURES.dimension, units.size)
        self.pupil = Pupil(self.student, self.lesson.kinds).eval()  # without dropout
        self.generator = self.pupil.beside["generated"]
        assert isinstance(self.generator, Generator)
        self.learner = Learner(
            self.settings, self.pupil, torch.optim.SGD(self.pupil.parameters(), 0.0), Exchange(self.pupil, Ranks())
        )
        self.learner.teachers = answerers({teacher: load_checkpoint(teacher)}, None)
        (self.teacher,) = self.learner.teachers.values()

    def slopes(self, loss: Tensor) -> dict[str, Tensor]:
        """By what is trained."""
        self.pupil.zero_grad()
        loss.backward()
        return {name: one.grad.clone() for name, one in self.pupil.named_parameters() if one.grad is not None}

    def said(self, features: Tensor) -> Tensor:
        rows: Tensor = self.teacher(features, self.batch.lengths).logits.log_softmax(-1)[self.batch.learned]
        return rows

    def apart(self, features: Tensor, student: nn.Module | None = None) -> Tensor:
        """KL(teacher ‖ student) of features, a mean over frames."""
        logits = (student or self.student)(features, self.batch.lengths).logits[self.batch.learned]
        return divergence(self.said(features), logits) / self.batch.frames

    @property
    def made(self) -> dict[str, Tensor]:
        generator = self.generator
        assert isinstance(generator, Generator)
        return generator.make(self.batch.features)


@pytest.fixture
def scene(job: Job, units: Units, teacher: str, tmp_path: Path) -> Callable[..., Scene]:
    return lambda **changes: Scene(job, units, teacher, tmp_path, **changes)


@pytest.mark.parametrize("turned", [0.0, 1.0, 0.4])
def test_the_student_descends_what_the_generator_climbs(scene: Callable[..., Scene], turned: float) -> None:
    here = scene(disagreement=turned, likeness=0.3, speech=2.0, spoken=0.01)
    found = here.slopes(_loss(here.learner, here.batch, here.lesson, 0.5))
    # the student: as from audio that happens to have these features
    features = here.made[MADE].detach()
    plain = here.slopes(0.7 * here.apart(features))
    of_student = {name: slope for name, slope in found.items() if name.startswith("student.")}
    assert of_student.keys() == plain.keys() and any(slope.abs().sum() > 0 for slope in plain.values())
    for name, slope in of_student.items():
        torch.testing.assert_close(slope, plain[name], atol=1e-6, rtol=1e-4)
    # the generator: up the same divergence through student and teacher both, down its own terms
    made = here.made
    spoken = log_spoken(here.said(made[MADE]), here.batch.learned)
    amiss = (spoken - math.log(2.0 * 0.01)).relu().mean()
    assert amiss > 0  # the teacher of this test speaks more than so
    own = 0.3 * distance(made["along"], here.moments) + 2.0 * amiss - turned * 0.7 * here.apart(made[MADE])
    expected = {name: slope for name, slope in here.slopes(own).items() if name.startswith("beside.")}
    assert expected.keys() == {name for name in found if name.startswith("beside.")}
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, atol=1e-6, rtol=1e-3)
    assert all(weight.grad is None for weight in here.teacher.parameters())


def test_the_loss_is_the_student_s_and_the_generator_s_own_terms(scene: Callable[..., Scene]) -> None:
    here = scene(likeness=0.0, speech=0.0)
    loss = _loss(here.learner, here.batch, here.lesson, 0.5)
    features = here.made[MADE].detach()
    said = here.said(features)
    entropy = -(said.exp() * said).sum() / here.batch.frames
    torch.testing.assert_close(loss, 0.7 * (here.apart(features) + entropy), rtol=1e-4, atol=1e-5)
    assert set(here.learner.notes) == {f"generated:{name}" for name in ("disagreement", "distance", "spoken")}
    torch.testing.assert_close(here.learner.notes["generated:disagreement"], here.apart(features), rtol=1e-4, atol=1e-5)


def test_answers_of_what_is_made_have_no_slope_but_in_their_own_part(scene: Callable[..., Scene]) -> None:
    here = scene()
    made = here.made[MADE]
    parts = answer(here.learner.teachers, replace(here.batch, clean=made), here.lesson)
    assert {name for name, part in parts.items() if part.values.requires_grad} == {"said"}
    heard = answer(here.learner.teachers, replace(here.batch, clean=made.detach()), here.lesson)
    assert heard.keys() == parts.keys() - {"said"}
    for (
        name,
        part,
    ) in heard.items():  # not to the bit: some CPUs compute an LSTM in another order where a slope is asked for
        torch.testing.assert_close(part.values, parts[name].values)


def test_a_reversed_slope_leaves_the_values_to_the_bit() -> None:
    values = torch.randn(50, requires_grad=True)
    found = reversed_slope(values, 0.3)
    assert torch.equal(found, values)
    (slope,) = torch.autograd.grad((found * torch.arange(50.0)).sum(), values)
    torch.testing.assert_close(slope, -0.3 * torch.arange(50.0))


def test_the_distance_is_0_at_the_moments_and_grows_with_each() -> None:
    moments = moments_of(2)
    drawn = np.random.default_rng(0).standard_normal((20_000, FEATURES.dimension), np.float32)
    along = torch.from_numpy(((moments.coloured(drawn) - moments.mean) @ moments.axes.T) / np.sqrt(moments.variance))[
        None
    ]
    near = distance(along, moments)
    assert near < 0.01
    white = torch.from_numpy(drawn)[None]
    torch.testing.assert_close(distance(along + 0.5, moments), near + 0.25, atol=0.02, rtol=0)
    assert distance(2 * along, moments) > 9 and distance(white, moments) > 0.1
    rough = torch.from_numpy((2 - moments.roughness) ** 2).mean()
    torch.testing.assert_close(distance(white, moments), rough, atol=0.05, rtol=0.05)
    alone = along[:, :1]
    torch.testing.assert_close(distance(alone, moments), alone.square().mean() + 1)  # no frame to differ from


def test_speech_is_counted_by_utterance_and_its_slope_does_not_vanish_in_silence() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64)
    learned = torch.tensor([[True] * 4, [True] * 3 + [False]])
    said = logits.log_softmax(-1)
    other = 1 - said.exp()[:, 0]
    expected = torch.stack([other[:4].mean(), other[4:].mean()]).log()
    torch.testing.assert_close(log_spoken(said, learned), expected)
    silent = torch.zeros(4, 4)
    silent[:, 0] = 40.0  # sure of the blank
    silent[2, 1] = 5.0
    silent.requires_grad_()
    found = log_spoken(silent.log_softmax(-1), torch.ones(1, 4, dtype=torch.bool))
    assert found.item() == pytest.approx(-36.4, abs=0.1)
    (slope,) = torch.autograd.grad(found.sum(), silent)
    assert slope[2, 0] < -0.9 and slope[2, 1] > 0.9 and slope.isfinite().all()


def test_garbage_of_which_nothing_is_said_is_driven_towards_speech(scene: Callable[..., Scene]) -> None:
    """The band: with a teacher that is nearly silent on what is made, a step of the generator makes it speak more."""
    here = scene(disagreement=0.0, likeness=0.0, spoken=0.9)
    with torch.no_grad():
        here.teacher.output.bias[0] += 12.0
    before = log_spoken(here.said(here.made[MADE]), here.batch.learned).mean().item()
    assert before < math.log(0.45) - 1
    for _ in range(20):
        here.slopes(_loss(here.learner, here.batch, here.lesson, 0.5))
        with torch.no_grad():
            for weight in here.generator.parameters():
                weight -= 0.02 * weight.grad
    assert log_spoken(here.said(here.made[MADE]), here.batch.learned).mean().item() > before + 0.5


def test_beside_audio_a_generator_has_slopes_of_0(scene: Callable[..., Scene]) -> None:
    here = scene()
    outputs, besides = here.pupil(here.batch.features, here.batch.lengths)
    assert torch.equal(outputs.logits, here.student(here.batch.features, here.batch.lengths).logits)
    found = here.slopes(0.0 * besides["generated"]["idle"].sum())
    assert found.keys() == {f"beside.generated.{name}" for name, _ in here.generator.named_parameters()}
    assert not any(slope.any() for slope in found.values())
