"""Cross-modal knowledge: what a language model of the units thinks of a teacher's spikes, left and right of each, enters its soft targets.

After Futami et al. 2022 (arXiv 2209.02030), who learn a masked language model's opinion of each token beside the text. Here it changes the
stored answers as they are read, so that every kind that learns them hears of it: in the frames of a spike each unit but the blank is weighted
by P(unit | the spikes to the left and right of it)^weight. What the teacher gives the blank, and what it did not keep, stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from asr_kd.decoding.ngram import END, read_arpa
from asr_kd.distillation.settings import OpinionSettings
from asr_kd.distillation.spikes import find_spikes
from asr_kd.errors import UserError
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.units import Units

#: a spike is part of its neighbours' context if in one of its frames at least this much is no blank
SAID = 0.5


class Opinion:
    """A language model of the units that has a say in soft targets.

    Raises:
        UserError: when the model cannot be read, or knows none of the units.
    """

    def __init__(self, settings: OpinionSettings, units: Units) -> None:
        self.weight, self.model = settings.weight, read_arpa(settings.lm)
        self.pieces = [units.piece(unit) for unit in range(units.size)]
        if not set(self.pieces) & set(self.model.words):
            raise UserError(
                f"opinion: {settings.lm} knows no unit of this run; make it of their pieces (asr-kd lm units=… pieces=true)"
            )

    def of(self, target: SparsePosteriors) -> SparsePosteriors:
        """The soft targets of an utterance with the model's opinion in them; each frame's most probable unit stands first again."""
        ids, probs = target.padded(int(target.counts.max()))
        edges = find_spikes(torch.from_numpy(ids), torch.from_numpy(probs), torch.tensor([target.frames]), 0, 0)
        spoken = np.where(ids != Units.blank, probs, 0.0)
        spikes = list(zip(edges.start.tolist(), edges.end.tolist(), strict=True))
        said = {
            start: self._best(target, start, end) for start, end in spikes if spoken[start:end].sum(1).max() >= SAID
        }
        log_probs, rows = target.log_probs.astype(np.float64), target.rows
        for start, end in spikes:
            entries = np.flatnonzero((rows >= start) & (rows < end) & (target.units != Units.blank))
            candidates, which = np.unique(target.units[entries], return_inverse=True)
            left, right = (
                [unit for at, unit in said.items() if ahead(at, start)] for ahead in (operator.lt, operator.gt)
            )
            opinion = self.weight * self._between(left, candidates.tolist(), right)[which]
            frame = rows[entries] - start
            before, after = log_probs[entries], log_probs[entries] + opinion
            log_probs[entries] = after + (_log_mass(before, frame) - _log_mass(after, frame))[frame]
        order = np.lexsort((target.units, -log_probs, rows))
        return replace(target, units=target.units[order], log_probs=log_probs[order].astype(np.float32))

    def _best(self, target: SparsePosteriors, start: int, end: int) -> int:
        """The unit, no blank, with the most mass in frames [start, end)."""
        spike = target[start:end]
        mass = np.bincount(spike.units, np.exp(spike.log_probs), target.num_units)
        mass[Units.blank] = 0.0
        return int(mass.argmax())

    def _between(self, left: Sequence[int], candidates: Sequence[int], right: Sequence[int]) -> np.ndarray:
        """float64 [candidates], ln P(candidate and what follows | left), the largest 0: P(candidate | left, right) up to a factor."""
        model, reach = self.model, self.model.order - 1
        before = model.start
        for unit in left[-reach:] if reach else ():
            _, before = model.score(before, self.pieces[unit])
        after = [*(self.pieces[unit] for unit in right[:reach]), *([END] if len(right) < reach else [])]
        scores = []
        for candidate in candidates:
            total, context = model.score(before, self.pieces[candidate])
            for piece in after:
                more, context = model.score(context, piece)
                total += more
            scores.append(total * math.log(10))
        return np.array(scores) - max(scores)


def _log_mass(log_probs: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """float64 [frames], the logarithm of the sum of probabilities of each frame from 0 on; entries of `frame` rise."""
    return np.log(np.bincount(frame, np.exp(log_probs)).clip(np.finfo(np.float64).tiny))
