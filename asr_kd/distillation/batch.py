"""What there is to learn from: an utterance as the loader reads it, and a batch of them as the network gets it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asr_kd.targets.posteriors import SparsePosteriors


@dataclass
class Example:
    """Something to learn from: features, and what the kinds of knowledge need beside them.

    Attributes:
        features: float16 [frames, dimension]; what is learned are the frames from `first` to before `last`, the others are context.
        ids: units of the text; None where no kind needs it.
        choices: transcripts to draw from, each as unit ids and with its score in nat.
        targets: soft targets of the learned frames.
        prior: float32 [units], in whose proportions the targets' tail is spread; None unless `missing_mass` is prior.
    """

    key: str
    features: np.ndarray
    ids: list[int] | None = None
    choices: list[tuple[list[int], float]] = field(default_factory=list)
    targets: SparsePosteriors | None = None
    prior: np.ndarray | None = None
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        self.last = self.last or len(self.features)

    @property
    def frames(self) -> int:
        """Frames that are learned."""
        return self.last - self.first


class Part(NamedTuple):
    """Something that a batch brings beside its features.

    Attributes:
        values: a row per learned frame of all utterances, one after the other; or, with `lengths`, the values of all utterances in
            a row; or, with `whole`, a table of the batch.
        lengths: int64 [utterances], how many values each utterance has.
        whole: whether it belongs to the batch, and not to its frames or utterances.
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
        last: int64 [batch], the frame before which learning ends; the others are context.
        source: which source of the phase it came from.
        parts: by name: `text` (unit ids, ragged); `soft.units`, `soft.probs` [learned frames, k], `soft.tail` [learned frames], the
            soft targets; `soft.priors` [shards, units], in whose proportions the tail is spread (whole), and `soft.prior`
            [learned frames], which of them is the frame's; and what kinds of knowledge add.
        seconds: of audio to learn, before any stretch.
        lane: which lane gave it.
        after: where that lane stands behind it.
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

    @property
    def frames(self) -> int:
        """Frames that are learned; neither padding nor context."""
        return int((self.last - self.first).sum())

    @property
    def learned(self) -> Tensor:
        """Bool [batch, frames]: which frames are learned."""
        frame = torch.arange(self.features.shape[1], device=self.features.device)[None, :]
        return (frame >= self.first[:, None]) & (frame < self.last[:, None])

    def to(self, device: torch.device) -> Batch:
        """The batch with all its tensors on the device; lengths stay in the host's memory."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("features", "first", "last")}
        parts = {
            name: part._replace(values=part.values.to(device, non_blocking=True)) for name, part in self.parts.items()
        }
        return replace(self, **moved, parts=parts)

    def of_rows(self, rows: Tensor) -> dict[str, Part]:
        """The parts of some of the learned frames, int64 [rows], and those of the whole batch; none of utterances."""
        return {
            name: part if part.whole else part._replace(values=part.values[rows])
            for name, part in self.parts.items()
            if part.lengths is None
        }
