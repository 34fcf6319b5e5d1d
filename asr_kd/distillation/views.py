"""Two views of an utterance that agree: consistency-regularised CTC (CR-CTC, Yao et al. 2024, arXiv 2410.05101).

Every utterance stands twice in its batch: first all of them, then all again, with the same stretch, vocal tract and noise, but with masks and
dropout drawn anew. Everything else that is learned applies to both; this kind pulls what the student says of a frame in one view towards what
it says of it in the other. Each is the other's teacher, without a gradient.
"""

from __future__ import annotations

from torch import Tensor

from asr_kd.distillation.knowledge import Knowledge, Seen


class Views(Knowledge):
    """`views`: KL(other view ‖ this view) in nat, a sum over the learned frames of both views, so that the mean over them is that of the two."""

    def loss(self, seen: Seen) -> Tensor:
        return view_divergence(seen.rows)


def view_divergence(rows: Tensor) -> Tensor:
    """KL of each frame from the same frame in the other view, summed; logits [frames, units], the second half those of the second view."""
    said = rows.log_softmax(-1)
    told = said.detach().roll(len(rows) // 2, 0)
    return (told.exp() * (told - said)).sum()
