"""What is true of every kind of knowledge: of its loss in a batch as the trainer makes it, with the networks that the trainer would run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asr_kd.distillation.answers import answer, prepare_answers
from asr_kd.distillation.batch import Batch, Example
from asr_kd.distillation.knowledge import Pupil, Seen
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Cursor
from asr_kd.training.step import batch_loss
from asr_kd.units import Units, load_units
from tests.training.conftest import FEATURES

Job = Callable[..., TrainSettings]
PAIR = {"student": "layer.2", "teacher": "layer.1"}
#: setting of a source (and the student's, where it is another one), and whether the loss of a batch is the sum of those of its utterances
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "ctc": ({"ctc": 1.0, "soft": 0.0, "teacher": None}, True),
    "soft": ({}, True),
    "temperature": ({"temperature": 2.0}, True),
    "spikes": ({"spikes": {}}, True),
    "sequences": ({"sequences": {"temperature": 1e-6}}, True),
    "select": ({"select": {"before_ms": 30.0}}, True),
    "delays": ({"delays": {"sharpness": 0.3}}, True),
    **{
        kind: ({"divergence": {"kind": kind, **more}}, kind != "pearson")
        for kind, more in {
            "forward": {"teacher_share": 0.5}, "reverse": {}, "jensen": {"beta": 0.5}, "skewed": {"alpha": 0.1},
            "skewed_reverse": {"alpha": 0.1}, "variation": {}, "decoupled": {}, "pearson": {},
        }.items()
    },
    "hint": ({"features": [{**PAIR, "samples": "frames"}]}, True),
    "hint of events": ({"features": [PAIR]}, False),  # the mean over a batch's events counts for each frame
    "cosine": ({"features": [{**PAIR, "match": "cosine", "samples": "frames"}]}, True),
    "as it is": (
        {"features": [{**PAIR, "match": "cosine", "samples": "frames", "projection": False}], "model": {"layers": 2, "size": 20}}, True
    ),
    "energy": ({"features": [{**PAIR, "match": "energy", "samples": "frames"}]}, True),
    "heads": ({"heads": [{"layer": "layer.1", "ctc": 0.3, "soft": 0.3, "top": 0.3}]}, True),
    "mutual": ({"mutual": {"peers": 2}}, True),
    "branches": ({"branches": {}}, True),
    "critic of outputs": ({"critics": [{}]}, False),  # means over a batch's samples, as of the next two
    "critic of frames": ({"critics": [{"samples": "frames"}]}, False),
    "critic of hidden states": ({"critics": [PAIR]}, False),
    "critics of peers": ({"mutual": {"peers": 2, "critic": 0.5}}, False),
    "views": ({"views": {"weight": 1.0}, "augment": {"time_masks": 1, "mel_masks": 1}}, False),  # masks are drawn by batch
    **{
        kind: ({"relations": [{"kind": kind, **more}]}, False)
        for kind, more in {
            "similarity": PAIR, "distance": PAIR, "angle": PAIR, "probability": PAIR, "correlation": PAIR, "gram": PAIR, "classes": {},
        }.items()
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(5)
    folder, units = tmp_path_factory.mktemp("teacher"), load_units(letters)
    kind = ModelSettings(kind="blstm", layers=1, size=10)
    model = build_model(kind, FEATURES.dimension, units.size)
    nn.init.normal_(model.output.weight, std=4.0)  # sure of what it says
    save_checkpoint(folder, model, units, FEATURES, kind)
    return str(folder)


class Scene:
    """A source with its lesson, its examples, and networks to learn it."""

    def __init__(self, settings: TrainSettings, units: Units, teacher: str) -> None:
        self.stream = PhaseStream(settings, 0, units)
        self.lesson, self.teacher = self.stream.lessons[0], {teacher: load_checkpoint(teacher).model}
        torch.manual_seed(1)
        student = build_model(settings.model, settings.features.dimension, units.size)
        nn.init.normal_(student.output.weight, std=2.0)
        self.pupil = Pupil(student, self.lesson.kinds).eval()
        self.examples = next(self.stream.sources[0].batches(0, Cursor(), 1))[0]

    def batch(self, examples: list[Example], padding: int = 0) -> Batch:
        """As the loader makes it, with so many frames more of what should not be heard."""
        batch = self.stream._collate(examples, 0, np.random.default_rng(0))
        batch.draws = (0,)

        def padded(features: Tensor | None) -> Tensor | None:
            return None if features is None else nn.functional.pad(features, (0, 0, 0, padding), value=3.7)

        return replace(batch, features=padded(batch.features), clean=padded(batch.clean))  # type: ignore[arg-type]

    def loss(self, batch: Batch, half: bool = False) -> Tensor:
        """Of a batch, a sum over its learned frames."""
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            if self.lesson.source.teacher:
                batch.parts |= answer(self.teacher, batch, self.lesson, 0.5)
                prepare_answers(batch, self.lesson.answered)
            outputs, besides = self.pupil(batch.features, batch.lengths)
        seen = Seen(outputs.logits.float(), outputs.lengths, batch.learned, batch.parts, outputs.hidden, {}, 0.5)
        return batch_loss(seen, self.lesson, 1, besides)


@pytest.fixture
def scene(job: Job, teacher: str, units: Units, request: pytest.FixtureRequest) -> Scene:
    source = {"targets": None, "teacher": teacher} | KINDS[request.param][0]
    changes = {"model": source.pop("model")} if "model" in source else {}
    return Scene(job(source=source, **changes, batch_frames=1000, bucket_utterances=10), units, teacher)


@pytest.mark.parametrize("scene", KINDS, indirect=True)
def test_padding_changes_nothing(scene: Scene) -> None:
    losses = [scene.loss(scene.batch(scene.examples, padding)) for padding in (0, 7)]
    assert losses[0] > 1e-3
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    weights = [weight for weight in scene.pupil.parameters() if weight.requires_grad]
    found = [torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scene", [name for name, (_, separate) in KINDS.items() if separate], indirect=True)
def test_a_batch_is_the_sum_of_its_utterances(scene: Scene) -> None:
    together = scene.loss(scene.batch(scene.examples))
    alone = [scene.loss(scene.batch([example])) for example in scene.examples]
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scene", KINDS, indirect=True)
def test_the_teacher_gets_no_gradient_and_half_precision_stays_finite(scene: Scene) -> None:
    exact, rough = (scene.loss(scene.batch(scene.examples), half) for half in (False, True))
    assert rough.dtype == torch.float32 and rough.isfinite()
    torch.testing.assert_close(exact, rough, rtol=0.25, atol=0.1)
    rough.backward()
    assert all(weight.grad is None for network in scene.teacher.values() for weight in network.parameters())
    slopes = [weight.grad for weight in scene.pupil.parameters() if weight.grad is not None]
    assert slopes and all(slope.isfinite().all() for slope in slopes)
