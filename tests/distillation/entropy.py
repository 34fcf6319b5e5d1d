"""A kind of knowledge as a stranger would add it: a head on a hidden layer that guesses how unsure the student is."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from asr_kd.distillation.kind_settings import WeighedSettings
from asr_kd.distillation.knowledge import Knowledge, Seen


class EntropySettings(WeighedSettings):
    """The student's own entropy."""

    make = "tests.distillation.entropy:Entropy"
    needs: ClassVar[frozenset[str]] = frozenset()


class Head(nn.Linear):
    def forward(self, outputs: Any, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"guess": super().forward(outputs.hidden["layer.1"])[..., 0]}


class Entropy(Knowledge):
    taps = ("layer.1",)

    def beside(self) -> nn.Module:
        return Head(self.task.model.size, 1)

    def loss(self, seen: Seen) -> Tensor:
        entropy = -(seen.logits.softmax(-1) * seen.logits.log_softmax(-1)).sum(-1)
        return ((seen.beside["guess"].float() - entropy)[seen.learned] ** 2).sum()
