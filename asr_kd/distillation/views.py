"""Two views of an utterance that agree: consistency-regularised CTC (CR-CTC, Yao et al. 2024, arXiv 2410.05101).

Every utterance stands twice in its batch: first all of them, then all again, with the same stretch, vocal tract and noise, but with masks and
dropout drawn anew. Everything else that is learned applies to both; this kind pulls what the student says of a frame in one view towards what
it says of it in the other. Each is the other's teacher, without a gradient.
"""

from __future__ import annotations

from torch import Tensor

from asr_kd.distillation.knowledge import Knowledge, Seen
from asr_kd.distillation.response import divergence_from


class Views(Knowledge):
    """`views`: KL(other view ‖ this view) in nat, a sum over the learned frames of both views, so that the mean over them is that of the two."""

    def loss(self, seen: Seen) -> Tensor:
        return divergence_from(seen.rows.roll(len(seen.rows) // 2, 0), seen.rows)
