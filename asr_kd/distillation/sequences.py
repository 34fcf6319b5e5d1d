"""Response knowledge of a CTC teacher as whole transcripts: the cross-entropy of sequences, by drawing them.

What a teacher says of an utterance is a distribution over transcripts, P(y). Its cross-entropy with the student's,
-Σ P(y) log Q(y), is what distillation asks for, and says nothing of *when*: each Q(y) is a sum over all alignments. The sum
over all transcripts cannot be computed, but the CTC loss of one that is drawn from P is an unbiased estimate of it, and a new
draw each time an utterance is heard averages over them. Towards temperature 0 it becomes CTC on the pseudo-label.

P is taken from one of two places:

- *soft targets*: frames are independent of each other given the audio, so a path that takes each frame's unit from that
  frame's distribution, collapsed, is an exact draw (the full sum, which arXiv 2303.05958 computes for other models);
- *n-best lists*, weighted by their scores (Takashima et al. 2018, 2019), which a search may have made with a lexicon and a
  language model: what the labelled text knows then enters the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from asr_kd.distillation.batch import Batch, Example, Part
from asr_kd.distillation.ctc import ctc_loss
from asr_kd.distillation.knowledge import Knowledge, Seen
from asr_kd.distillation.settings import SequenceSettings
from asr_kd.units import Units


class SoftSequences(Knowledge):
    """`sequences`: transcripts drawn anew each time an utterance is heard, by CTC."""

    def prepare(self, examples: Sequence[Example], batch: Batch, rng: np.random.Generator) -> None:
        """See `Knowledge`."""
        if examples[0].choices:
            ids, sizes = draw_from_lists([one.choices for one in examples], self.settings, rng)
        else:
            units, probs = batch.parts["soft.units"].values, batch.parts["soft.probs"].values
            ids, sizes = draw_sequences(units, probs, batch.lengths, self.settings, rng)
        batch.parts["sequences"] = Part(ids, sizes)

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`."""
        draws = self.settings.draws
        log_probs = seen.logits.log_softmax(-1).repeat(draws, 1, 1)
        return ctc_loss(log_probs, seen.lengths.repeat(draws), seen.parts["sequences"]) / draws


def draw_sequences(
    units: Tensor, probs: Tensor, lengths: Tensor, settings: SequenceSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw transcripts of each utterance from soft targets.

    What the targets did not keep is never drawn: the kept units share its mass.

    Args:
        units: int64 [frames, k], kept units of the utterances one after the other; probs: float [frames, k], their
            probabilities, 0 where there is none.
        lengths: int64 [utterances], frames of each.
        settings: how many are drawn, and the temperature: each frame's unit is drawn by the power of 1 / temperature of
            its probabilities.

    Returns:
        int64 unit ids in a row, of a transcript of each utterance, then of a second one of each, and so on, and int64
        [draws * utterances], how many each has. They fit into the frames.
    """
    weights = probs.double()
    if settings.temperature != 1.0:
        weights = (weights / weights.amax(1, keepdim=True)) ** (1 / settings.temperature)
    reached = weights.cumsum(1)
    utterance = torch.arange(len(lengths)).repeat_interleave(lengths)
    ids, sizes = [], []
    for _ in range(settings.draws):
        points = torch.from_numpy(rng.random((len(reached), 1))) * reached[:, -1:]
        path = units.gather(1, (points >= reached).sum(1, keepdim=True))[:, 0]
        spoken = path != Units.blank
        spoken[1:] &= (path[1:] != path[:-1]) | (utterance[1:] != utterance[:-1])
        ids.append(path[spoken])
        sizes.append(utterance[spoken].bincount(minlength=len(lengths)))
    return torch.cat(ids), torch.cat(sizes)


def draw_from_lists(
    lists: list[Sequence[tuple[list[int], float]]], settings: SequenceSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw transcripts of each utterance from its n-best list, by the softmax of the scores / temperature.

    Args:
        lists: of each utterance at least one transcript, as unit ids and with its score in nat.

    Returns:
        as `draw_sequences`.
    """
    drawn = []
    for choices in lists * settings.draws:
        scores = np.array([score for _, score in choices]) / settings.temperature
        reached = np.exp(scores - scores.max()).cumsum()
        drawn.append(choices[int((rng.random() * reached[-1] >= reached).sum())][0])
    ids = [unit for one in drawn for unit in one]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor([len(one) for one in drawn])
