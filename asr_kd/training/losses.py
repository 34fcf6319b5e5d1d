"""What a batch teaches: the weighted losses of its source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asr_kd.distillation.response import soft_cross_entropy
from asr_kd.distillation.spikes import find_spikes, spike_cross_entropy
from asr_kd.training.batches import Batch
from asr_kd.training.sequence import expected_word_errors
from asr_kd.training.settings import PhaseSettings, TrainSettings
from asr_kd.units import Units

#: log-probability that CTC sees for a unit outside its targets: a path there is always worse, and never impossible
OUTSIDE = -30.0


def batch_loss(logits: Tensor, lengths: Tensor, batch: Batch, plan: PhaseSettings, settings: TrainSettings) -> Tensor:
    """The weighted sum of a source's losses, each a mean over the frames of the batch.

    Args:
        logits: float32 [batch, frames, units]; lengths: int64 [batch].
    """
    source = plan.sources[batch.source]
    learned = _between(logits, batch.first, batch.last)
    loss = logits.new_zeros(())
    if source.ctc:
        assert batch.labels is not None and batch.label_lengths is not None
        log_probs = logits.log_softmax(-1)
        if source.ctc_within_targets:
            inside = log_probs.masked_fill(~_allowed(logits, learned, batch), OUTSIDE)
            # torch's ctc_loss has the right gradient for a distribution only: normalise, and add the norm back
            log_probs = inside.log_softmax(-1)
            loss = loss - source.ctc * inside.logsumexp(-1)[learned].sum() / batch.frames
        loss = loss + source.ctc * _ctc(log_probs, lengths, batch.labels, batch.label_lengths) / batch.frames
    if source.mwer:
        assert batch.labels is not None and batch.label_lengths is not None and batch.spelling is not None
        errors = expected_word_errors(logits, lengths, batch.labels, batch.label_lengths, batch.spelling, source.mwer)
        loss = loss + errors.sum() / batch.frames
    if source.sequences:
        assert batch.drawn is not None and batch.drawn_lengths is not None
        draws = len(batch.drawn_lengths) // len(lengths)
        log_probs = logits.log_softmax(-1).repeat(draws, 1, 1)
        total = _ctc(log_probs, lengths.repeat(draws), batch.drawn, batch.drawn_lengths) / draws
        loss = loss + source.soft * total / batch.frames
    elif source.soft:
        rows = logits[learned]
        losses = soft_losses(rows, batch, settings)
        total = losses.sum()
        if source.spikes:
            assert batch.units is not None and batch.probs is not None
            spikes = find_spikes(batch.units, batch.probs, batch.last - batch.first, source.spikes)
            targets = batch.units.to(logits.device), batch.probs.to(logits.device)
            total = losses[spikes.outside(len(losses))].sum()
            events = spike_cross_entropy(rows, *targets, spikes, source.spikes.temperature, source.spikes.certainty)
            total = total + events.sum()
        loss = loss + source.soft * total / batch.frames
    return loss


def _ctc(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """The CTC loss of all utterances together, of log-probabilities [batch, frames, units]."""
    device = log_probs.device
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1), labels.to(device), lengths.to(device), label_lengths.to(device), Units.blank, "sum"
    )


def soft_losses(rows: Tensor, batch: Batch, settings: TrainSettings, places: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy of each frame against its soft target.

    Args:
        rows: float32 [frames, units], logits of the batch's learned frames; or of some of them, by their int64 [frames] places.
    """
    values = (batch.units, batch.probs, batch.tail, batch.prior)
    units, probs, tail, prior = (
        None if one is None else one.to(rows.device) if places is None else one.to(rows.device)[places]
        for one in values
    )
    assert units is not None and probs is not None and tail is not None
    priors = None if batch.priors is None else batch.priors.to(rows.device)
    losses = soft_cross_entropy(rows, units, probs, tail, settings.missing_mass, priors, prior)
    return losses * torch.where(units[:, 0] == Units.blank, settings.blank_weight, 1.0)


def _between(logits: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Bool [batch, frames]: which frames lie from `first` to before `last`, int64 [batch]."""
    frame = torch.arange(logits.shape[1], device=logits.device)[None, :]
    return (frame >= first.to(logits.device)[:, None]) & (frame < last.to(logits.device)[:, None])


def _allowed(logits: Tensor, learned: Tensor, batch: Batch) -> Tensor:
    """Bool [batch, frames, units]: the blank, and the units that the targets hold at the frame."""
    assert batch.units is not None and batch.probs is not None
    held = logits.new_zeros(len(batch.units), logits.shape[2])
    held.scatter_add_(1, batch.units.to(logits.device), batch.probs.to(logits.device))
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[learned] = held > 0
    allowed[..., Units.blank] = True
    return allowed
