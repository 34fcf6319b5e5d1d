"""Training data: an utterance as the loader reads it, and a batch of utterances as the network gets it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asr_kd.audio.batched import Input
from asr_kd.targets.hidden import HiddenStates, SideBySide
from asr_kd.targets.posteriors import SparsePosteriors


@dataclass
class Example:
    """An utterance, or a chunk of one: features, and what the kinds of knowledge need besides.

    Attributes:
        features: float16 [frames, dimension], or `Deferred` of a whole utterance; frames `first` to before `last` are learned, the others are context.
        ids: unit ids of the text; None if no kind needs it.
        choices: transcripts to draw from, each as unit ids with a score in nat.
        targets: soft targets of the learned frames.
        prior: float32 [units], the proportions in which the targets' tail is spread; None unless `missing_mass` is prior.
        clean: `features` before noise was added; None: they are clean.
        sound: float32 [samples], the clean sound; None unless a teacher from outside answers in the step.
        hidden: what is stored of the teachers' hidden states of the learned frames; None if no kind needs them.
    """

    key: str
    features: Any
    ids: list[int] | None = None
    choices: list[tuple[list[int], float]] = field(default_factory=list)
    targets: SparsePosteriors | None = None
    prior: np.ndarray | None = None
    clean: Any = None
    sound: np.ndarray | None = None
    hidden: HiddenStates | SideBySide | None = None
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        self.last = self.last or len(self.features)

    @property
    def frames(self) -> int:
        """Frames that are learned."""
        return self.last - self.first


class Part(NamedTuple):
    """A tensor that a batch has besides its features.

    Attributes:
        values: a row per learned frame, utterance after utterance; or, with `lengths`, the values of all utterances one after
            the other; or, with `whole`, a table of the batch.
        lengths: int64 [utterances], number of values of each utterance.
        whole: whether it belongs to the batch as a whole, not to its frames or utterances.
    """

    values: Tensor
    lengths: Tensor | None = None
    whole: bool = False


@dataclass
class Batch:
    """One step's input.

    Attributes:
        features: float32 [batch, frames, inputs].
        lengths: int64 [batch].
        first: int64 [batch], the first frame that is learned.
        last: int64 [batch], one past the last frame that is learned; frames outside are context.
        source: index of its source in the phase.
        parts: by name. `text`: unit ids, ragged. Soft targets: `soft.units` and `soft.probs` [learned frames, k], `soft.tail`
            [learned frames]; `soft.priors` [shards, units], whole, the proportions in which tails are spread, and
            `soft.prior` [learned frames], the row of it for each frame. Hidden states of who answers: `hidden.` and a tap,
            float32 [learned frames, width] (of stored events, the event of the spike that a frame is in), or `codes.` and a
            tap, int64 [learned frames, codebooks]. `sound`: samples, ragged, for teachers from outside. And what kinds of knowledge add.
        seconds: audio to learn, before any stretch.
        lane: index of its lane.
        after: position of the lane after this batch.
        clean: `features` without noise, masks and another vocal tract; None unless somebody answers in the step.
        draws: seeds what is drawn from answers that are given in the step.
        coming: what `to` makes `features` and `clean` of, on its device; until then `features` have no inputs. None: they are there.
    """

    features: Tensor
    lengths: Tensor
    first: Tensor
    last: Tensor
    source: int
    parts: dict[str, Part] = field(default_factory=dict)
    seconds: float = 0.0
    lane: int = 0
    after: Any = None
    clean: Tensor | None = None
    draws: tuple[int, ...] = ()
    coming: Input | None = None

    @property
    def frames(self) -> int:
        """Number of learned frames, without padding and context."""
        return int((self.last - self.first).sum())

    @property
    def learned(self) -> Tensor:
        """Bool [batch, frames]: which frames are learned."""
        frame = torch.arange(self.features.shape[1], device=self.features.device)[None, :]
        return (frame >= self.first[:, None]) & (frame < self.last[:, None])

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on the device; lengths stay in host memory."""
        features, clean = (self.features, self.clean) if self.coming is None else self.coming.made(device)
        tensors = {"features": features, "first": self.first, "last": self.last, "clean": clean}
        moved: dict[str, Any] = {
            name: one.to(device, non_blocking=True) for name, one in tensors.items() if one is not None
        }
        parts = {
            name: part._replace(values=part.values.to(device, non_blocking=True)) for name, part in self.parts.items()
        }
        return replace(self, **moved, parts=parts, coming=None)

    def of_rows(self, rows: Tensor) -> dict[str, Part]:
        """The parts of some learned frames, int64 [rows], and of the whole batch, without those of utterances."""
        return {
            name: part if part.whole else part._replace(values=part.values[rows])
            for name, part in self.parts.items()
            if part.lengths is None
        }
