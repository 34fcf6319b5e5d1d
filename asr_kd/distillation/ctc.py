"""The text, by CTC (Graves et al. 2006): what teachers learn, and students that learn from transcripts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asr_kd.distillation.batch import Part
from asr_kd.distillation.knowledge import Knowledge, Seen
from asr_kd.units import Units

#: log-probability given to units that the targets do not hold: such a path is always worse, but never impossible
OUTSIDE = -30.0


def ctc_losses(log_probs: Tensor, lengths: Tensor, text: Part) -> Tensor:
    """As `ctc_loss`, of each utterance: float [batch]."""
    assert text.lengths is not None
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1), text.values, lengths.to(log_probs.device), text.lengths.to(log_probs.device), Units.blank, "none"
    )  # fmt: skip


def ctc_loss(log_probs: Tensor, lengths: Tensor, text: Part) -> Tensor:
    """The CTC loss of all utterances together, in nat.

    `log_probs` are float [batch, frames, units], normalised, `lengths` int64 [batch], and `text` their unit ids.
    """
    assert text.lengths is not None
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1), text.values, lengths.to(log_probs.device), text.lengths.to(log_probs.device), Units.blank, "sum"
    )  # fmt: skip


class Ctc(Knowledge):
    """`ctc`: the summed probability of all alignments of the text."""

    def loss(self, seen: Seen) -> Tensor:
        return ctc_loss(seen.logits.log_softmax(-1), seen.lengths, seen.parts["text"])


class CtcWithinTargets(Knowledge):
    """`ctc_within_targets`: the same over only those alignments whose units the targets hold at that frame."""

    def loss(self, seen: Seen) -> Tensor:
        inside = seen.logits.log_softmax(-1).masked_fill(~_allowed(seen), OUTSIDE)
        # the gradient of torch's ctc_loss is right only for a distribution: normalise, and add the norm back
        total = ctc_loss(inside.log_softmax(-1), seen.lengths, seen.parts["text"])
        return total - inside.logsumexp(-1)[seen.learned].sum()


def _allowed(seen: Seen) -> Tensor:
    """Bool [batch, frames, units]: the blank, and the units that the targets hold at the frame."""
    units, probs = seen.parts["soft.units"].values, seen.parts["soft.probs"].values
    held = seen.logits.new_zeros(len(units), seen.logits.shape[2])
    held.scatter_add_(1, units, probs)
    allowed = torch.zeros_like(seen.logits, dtype=torch.bool)
    allowed[seen.learned] = held > 0
    allowed[..., Units.blank] = True
    return allowed
