"""A kind that compares hidden states as they are: the student's first entries against the teacher's, of frames or of events."""

from __future__ import annotations

from torch import Tensor

from asr_kd.distillation.hidden import Hidden
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.settings import HiddenSettings


class NearSettings(HiddenSettings):
    """The student's hidden states near those of who answers."""

    make = "tests.distillation.near:Near"


class Near(Hidden):
    def loss(self, seen: Seen) -> Tensor:
        student, teacher, *_ = self.pairs(seen)
        width = min(self.widths)
        return (student[:, :width] - teacher[:, :width]).square().sum()
