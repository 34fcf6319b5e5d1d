"""Response knowledge of a CTC teacher as whole transcripts: the cross-entropy over sequences, estimated by sampling.

A teacher's answer for an utterance is a distribution over transcripts, P(y). Distillation asks for its cross-entropy with the
student's, -Σ P(y) log Q(y), which does not depend on timing: each Q(y) is a sum over all alignments. The sum over all
transcripts cannot be computed, but the CTC loss of one transcript drawn from P is an unbiased estimate of it, and a new draw
in every pass averages over transcripts. As the temperature goes to 0 this becomes CTC on the pseudo-label.

P comes from one of two sources:

- *soft targets*: frames are independent of each other given the audio, so drawing a unit from each frame's distribution and
  collapsing the path is an exact draw (of the full sum, which arXiv 2303.05958 computes for other models);
- *n-best lists*, weighted by their scores (Takashima et al. 2018, 2019). The search may have used a lexicon and a language
  model, so that the targets contain knowledge of the labelled text. Their best few can also be learned all at once (`best`), which costs
  a CTC recursion each and has no draws' noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from asr_kd.distillation.batch import Batch, Example, Part
from asr_kd.distillation.ctc import ctc_loss, ctc_losses
from asr_kd.distillation.knowledge import Knowledge, Seen
from asr_kd.distillation.settings import SequenceSettings
from asr_kd.units import Units


class SoftSequences(Knowledge):
    """`sequences`: CTC on transcripts that are drawn each time an utterance is read."""

    def prepare(self, examples: Sequence[Example], batch: Batch, rng: np.random.Generator) -> None:
        if self.settings.best:
            batch.parts |= weigh_lists([one.choices for one in examples], self.settings)
            return
        if examples and examples[0].choices:
            ids, sizes = draw_from_lists([one.choices for one in examples], self.settings, rng)
        else:
            units, probs = batch.parts["soft.units"].values, batch.parts["soft.probs"].values
            ids, sizes = draw_sequences(units, probs, batch.lengths, self.settings, rng)
        batch.parts["sequences"] = Part(ids, sizes)

    def loss(self, seen: Seen) -> Tensor:
        if self.settings.best:
            return self._of_lists(seen)
        draws = self.settings.draws
        log_probs = seen.logits.log_softmax(-1).repeat(draws, 1, 1)
        return ctc_loss(log_probs, seen.lengths.repeat(draws), seen.parts["sequences"]) / draws

    def _of_lists(self, seen: Seen) -> Tensor:
        text, weights = seen.parts["sequences"], seen.parts["sequences.weights"].values
        best = self.settings.best
        log_probs = seen.logits.log_softmax(-1).repeat_interleave(best, 0)
        losses = ctc_losses(log_probs, seen.lengths.repeat_interleave(best), text)
        return (weights * torch.where(weights > 0, losses, 0.0)).sum()


def weigh_lists(lists: list[Sequence[tuple[list[int], float]]], settings: SequenceSettings) -> dict[str, Part]:
    """The best transcripts of each utterance's list, as the parts of a batch; those that are spelled alike are one.

    Returns:
        `sequences`: unit ids of `settings.best` transcripts of each utterance, one after the other, the first again where a list has fewer;
        `sequences.weights`: float32 [utterances * best], the softmax of the scores / temperature over what is learned of a list, 0 for
        what is there again.
    """
    chosen: list[list[int]] = []
    weights = np.zeros((len(lists), settings.best or 1), np.float32)
    for row, choices in zip(weights, lists, strict=True):
        scores: dict[tuple[int, ...], float] = {}
        for ids, score in choices:
            scores[tuple(ids)] = np.logaddexp(scores.get(tuple(ids), -np.inf), score / settings.temperature)
        best = sorted(scores, key=lambda ids: -scores[ids])[: len(row)]
        own = np.array([scores[ids] for ids in best])
        row[: len(best)] = np.exp(own - np.logaddexp.reduce(own))
        chosen += [list(ids) for ids in best + best[:1] * (len(row) - len(best))]
    spelled = torch.tensor([unit for one in chosen for unit in one], dtype=torch.int64)
    text = Part(spelled, torch.tensor([len(one) for one in chosen]))
    return {"sequences": text, "sequences.weights": Part(torch.from_numpy(weights.reshape(-1)), whole=True)}


def draw_sequences(
    units: Tensor, probs: Tensor, lengths: Tensor, settings: SequenceSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw transcripts of each utterance from soft targets.

    Units that were not kept are never drawn: the kept units share their mass.

    Args:
        units: int64 [frames, k], kept unit ids, utterance after utterance.
        probs: float [frames, k], their probabilities, 0 where there is none.
        lengths: int64 [utterances], number of frames of each.
        settings: number of draws, and temperature: units are drawn by their probabilities to the power 1 / temperature.
        rng: decides the draws.

    Returns:
        int64 unit ids of a transcript of each utterance, then of a second one of each, and so on, one after the other; and
        int64 [draws * utterances], the length of each. They are short enough for the frames.
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
    """As `draw_sequences`, from the n-best list of each utterance: one transcript or more, as unit ids with a score in nat.

    They are drawn by the softmax of the scores / temperature.
    """
    drawn = []
    for choices in lists * settings.draws:
        scores = np.array([score for _, score in choices]) / settings.temperature
        reached = np.exp(scores - scores.max()).cumsum()
        drawn.append(choices[int((rng.random() * reached[-1] >= reached).sum())][0])
    ids = [unit for one in drawn for unit in one]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor([len(one) for one in drawn])
