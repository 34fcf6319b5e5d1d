"""Sequence training: minimum expected word errors of a CTC model, for the last steps of training on labelled audio.

Cross-entropy maximises the probability of the reference, but what counts in the end is the number of wrong words. With P(h)
the probability of a unit sequence, summed over all its alignments, and W(h) its word errors, the expected word errors are
Σ P(h) W(h), and

    d Σ P(h) W(h) = Σ P(h) (W(h) - mean W) d log P(h):

sequences better than the mean become more probable. There are too many sequences to sum over, so a few candidates are used:

- **n-best** (MWER; Prabhavalkar et al. 2017, arXiv 1712.01818): the best sequences of a prefix beam search, with their P
  renormalised over the list. Little noise, but biased towards what is in the beam.
- **sampled** (Shannon 2017, "Optimizing expected word error rate via sampling for speech recognition"): N paths, each
  frame's unit drawn from the softmax, collapsed to sequences. A path of CTC is a product over frames, so these are exact
  draws of P. Each is compared with the mean errors of the N - 1 others, which are independent of it, so that the gradient

      1/N Σ (W(hᵢ) - mean of the others' W) d log P(hᵢ) = 1/(N-1) Σ (W(hᵢ) - mean W) d log P(hᵢ)

  is an unbiased estimate of that of the expected errors over all sequences. It is noisy, and there is nothing to learn from
  an utterance if all draws make the same number of errors.

The trainer adds this to a share of CTC ("smoothing"), which still has a gradient where the candidates are equally good.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import torch
from torch import Tensor, nn

from asr_kd.decoding.beam import prefix_beam_search
from asr_kd.decoding.wer import word_errors
from asr_kd.distillation.batch import Part
from asr_kd.distillation.kind_settings import MwerSettings
from asr_kd.distillation.knowledge import Knowledge, Seen
from asr_kd.units import Units

#: candidate unit sequences of an utterance, and how often each was found
Hypotheses = Counter[tuple[int, ...]]


class Mwer(Knowledge):
    """`mwer`: expected word errors."""

    def loss(self, seen: Seen) -> Tensor:
        text = seen.parts["text"]
        assert self.task.units is not None
        return expected_word_errors(seen.logits, seen.lengths, text, self.task.units, self.settings).sum()


def expected_word_errors(logits: Tensor, lengths: Tensor, text: Part, units: Units, settings: MwerSettings) -> Tensor:
    """Expected word errors of each utterance; differentiable once.

    Args:
        logits: float [batch, frames, units].
        lengths: int64 [batch].
        text: reference unit ids of each utterance.
        units: vocabulary. The reference is spelled by it too, so that what it cannot spell is no error.
        settings: number of candidates an utterance, and whether they are drawn (by torch's global random state) or the best.

    Returns:
        [batch], of the logits' type; NaN if the logits are not finite.
    """
    log_probs = logits.log_softmax(-1)
    if not torch.isfinite(log_probs).all():  # the trainer stops at a NaN loss with a message
        return log_probs.sum((1, 2)) * math.nan
    number = settings.hypotheses
    found = (sampled_paths if settings.sampled else n_best)(log_probs.detach(), lengths, number)
    assert text.lengths is not None
    references = [units.decode(ids.tolist()) for ids in text.values.split(text.lengths.tolist())]
    errors = _padded([
        [sum(word_errors(reference, units.decode(ids))) for ids in one]
        for one, reference in zip(found, references, strict=True)
    ], logits)  # fmt: skip
    counts = _padded([list(one.values()) for one in found], logits)
    scores = sequence_log_probs(log_probs, lengths, found)
    if settings.sampled:
        weights, scale = counts / number, number / (number - 1)
    else:
        weights, scale = scores.detach().masked_fill(counts == 0, -math.inf).softmax(-1), 1.0
    expected = (weights * errors).sum(-1)
    slopes = scale * weights * (errors - expected[:, None])
    # the value of the first term, and the gradient of the second by each log P
    return expected + (slopes * (scores - scores.detach())).sum(-1)


def n_best(log_probs: Tensor, lengths: Tensor, number: int) -> list[Hypotheses]:
    """Up to `number` sequences of each utterance by prefix beam search in float [batch, frames, units], each counted once."""
    rows = log_probs.float().cpu().numpy()
    return [
        Hypotheses(tuple(ids) for ids, _ in prefix_beam_search(row[:length], number, Units.blank))
        for row, length in zip(rows, lengths.tolist(), strict=True)
    ]


def sampled_paths(log_probs: Tensor, lengths: Tensor, number: int) -> list[Hypotheses]:
    """The sequences of `number` paths of each utterance, drawn frame by frame from float [batch, frames, units]."""
    batch, frames, units = log_probs.shape
    drawn = log_probs.exp().reshape(-1, units).multinomial(number, replacement=True)
    paths = drawn.reshape(batch, frames, number).transpose(1, 2)
    emits = paths != Units.blank
    emits[:, :, 1:] &= paths[:, :, 1:] != paths[:, :, :-1]
    emits &= torch.arange(frames, device=paths.device) < lengths.to(paths.device)[:, None, None]
    ids, sizes = iter(paths[emits].tolist()), emits.sum(-1).tolist()
    return [Hypotheses(tuple(itertools.islice(ids, size)) for size in row) for row in sizes]


def sequence_log_probs(log_probs: Tensor, lengths: Tensor, hypotheses: list[Hypotheses]) -> Tensor:
    """log P of each hypothesis, summed over its alignments, in one call of the CTC recursion.

    Args:
        log_probs: float [batch, frames, units], normalised.
        lengths: int64 [batch].
        hypotheses: at least one for each utterance, each short enough for its frames.

    Returns:
        float [batch, most hypotheses of an utterance], 0 where an utterance has fewer.
    """
    device = log_probs.device
    sizes = torch.tensor([len(one) for one in hypotheses])
    rows = torch.arange(len(sizes)).repeat_interleave(sizes)
    sequences = [ids for one in hypotheses for ids in one]
    losses = nn.functional.ctc_loss(
        log_probs.index_select(0, rows.to(device)).transpose(0, 1),
        torch.tensor([unit for ids in sequences for unit in ids], dtype=torch.int64, device=device),
        lengths.to(device)[rows.to(device)], torch.tensor([len(ids) for ids in sequences], device=device),
        Units.blank, "none",
    )  # fmt: skip
    inside = torch.arange(int(sizes.max())) < sizes[:, None]
    return torch.zeros(inside.shape, dtype=losses.dtype, device=device).masked_scatter(inside.to(device), -losses)


def _padded(rows: list[list[int]], like: Tensor) -> Tensor:
    """Rows of different lengths as a tensor like `like`, padded with 0."""
    width = max(map(len, rows))
    return like.new_tensor([[*row, *[0] * (width - len(row))] for row in rows])
