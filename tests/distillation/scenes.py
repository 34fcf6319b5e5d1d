"""Batches made by hand for tests of the kinds that compare hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.batch import Batch, Part
from asr_kd.distillation.hidden import Hidden
from asr_kd.distillation.knowledge import Seen, Task
from asr_kd.distillation.settings import Asked, HiddenSettings
from asr_kd.models.network import Outputs
from asr_kd.models.settings import ModelSettings

UNITS, OWN, THEIRS = 4, 5, 3
Kind = TypeVar("Kind", bound=Hidden)


def kind_of(make: type[Kind], settings: HiddenSettings, theirs: int = THEIRS) -> Kind:
    """A kind of a student with layers of width `OWN`, and a teacher of width `theirs`."""
    model = ModelSettings(layers=2, size=OWN)
    task = Task(None, FeatureSettings(sample_rate=8000, mels=8), model, "ghost", {"layer.1": theirs, "layer.2": theirs})
    return make(Asked("kind" + settings.tag, 1.0, settings, settings.needs), task)


@dataclass
class Utterance:
    """An utterance of which some frames are learned; float64.

    Attributes:
        path: what the teacher says, a mark for each learned frame: . is the blank.
        logits: [frames, units] of the student.
        student: [frames, `OWN`].
        teacher: [learned frames, width].
        before: frames of context before those that are learned.
    """

    path: str
    logits: Tensor
    student: Tensor
    teacher: Tensor
    before: int = 0


def utterance(path: str, seed: int = 0, before: int = 0, after: int = 0, theirs: int = THEIRS) -> Utterance:
    """One with random states, and frames of context on both sides."""
    draw = torch.Generator().manual_seed(seed)
    frames = before + len(path) + after
    sizes = (frames, UNITS), (frames, OWN), (len(path), theirs)
    return Utterance(path, *(torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes), before)


def soft(path: str, sure: float = 0.97) -> dict[str, Part]:
    """Soft targets that keep all units: `sure` of the path's."""
    probs = torch.full((len(path), UNITS), (1 - sure) / (UNITS - 1))
    for frame, mark in enumerate(path):
        probs[frame, 0 if mark == "." else int(mark)] = sure
    kept, units = probs.sort(dim=1, descending=True, stable=True)
    return {"soft.units": Part(units), "soft.probs": Part(kept), "soft.tail": Part(torch.zeros(len(path)))}


def seen_by(kind: Hidden, several: Sequence[Utterance], padding: int = 0, project: Any = None) -> Seen:
    """The utterances as one batch, with rubbish in at least `padding` frames after each.

    Args:
        kind: prepares its parts.
        several: the utterances.
        padding: frames behind the longest.
        project: module beside the student, if the kind has one.
    """
    lengths = torch.tensor([len(one.student) for one in several])
    first = torch.tensor([one.before for one in several])
    learned = torch.tensor([len(one.path) for one in several])
    frames = int(lengths.max()) + padding
    features = torch.zeros(len(several), frames, 1)
    parts = soft("".join(one.path for one in several))
    parts["hidden.layer.2"] = Part(torch.cat([one.teacher for one in several]))
    batch = Batch(features, lengths, first, first + learned, 0, parts)
    kind.prepare((), batch, np.random.default_rng(0))
    logits, student = (
        torch.stack([torch.cat([rows, rows.new_full((frames - len(rows), rows.shape[1]), 7.0)]) for rows in column])
        for column in ([one.logits for one in several], [one.student for one in several])
    )
    hidden = {"layer.1": student}
    beside = project(Outputs(logits, lengths, hidden), features, lengths) if project else {}
    return Seen(logits, lengths, batch.learned, batch.parts, hidden, beside)
