"""The interface of a network: features and lengths in, logits and hidden states out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asr_kd.units import Units


class Outputs(NamedTuple):
    """A network's output for a batch.

    Attributes:
        logits: [batch, frames, units]; a row belongs to the input frame of the same index, whatever the network's delay.
        lengths: int64 [batch], those of the input.
        hidden: for each tap that was asked for, [batch, frames, width], aligned with the logits; and for each conditioned layer
            `logits.1` and so on, [batch, frames, units], what the output layer says there.
    """

    logits: Tensor
    lengths: Tensor
    hidden: dict[str, Tensor]


class Condition(nn.Module):
    """Self-conditioning (Nozaki & Komatsu 2021, arXiv 2104.02724): a layer hears what the output layer says of the layer before it.

    The projection is shared by all conditioned layers, as the output layer is. It starts at 0, so that a new network begins as one without.

    Attributes:
        held_back: float32 [1], what was taken off the blank in the output layer's bias; it is for the answer alone, so here it comes back.
    """

    held_back: Tensor

    def __init__(self, units: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(units, width, bias=False)
        nn.init.zeros_(self.project.weight)
        self.register_buffer("held_back", torch.zeros(1))

    def forward(self, hidden: Tensor, output: nn.Linear, dropout: nn.Module) -> tuple[Tensor, Tensor]:
        """For a hidden state [..., width] frame by frame: that state for the next layer, and the logits [..., units]."""
        logits = output(dropout(hidden))
        blank = torch.arange(logits.shape[-1], device=logits.device) == Units.blank
        logits = logits + self.held_back * blank
        return hidden + self.project(logits.softmax(-1)), logits


class AcousticModel(nn.Module):
    """Base class of all networks: a new one is a file with such a class, and a line in `NETWORKS`.

    Padding never changes the rows within an utterance's length.

    Attributes:
        taps: hidden states that can be asked for, with their widths: `layer.1` after the first layer, and so on.
        lookahead_frames: how far the output looks ahead, in frames; None for the whole utterance.
        streams: whether it can run while audio arrives: then it has `stream` and `delay`.
        output: the last, linear layer.
        condition: tells layers what the output layer says below them; None where no layer is conditioned.
    """

    taps: dict[str, int]
    lookahead_frames: int | None
    streams: bool = False
    #: number of outputs of `stream` before that of the first frame
    delay: int = 0
    output: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.condition: Condition | None = None

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Run on whole utterances.

        Args:
            features: float32 [batch, frames, inputs].
            lengths: int64 [batch].
            taps: names of hidden states to return.
        """
        raise NotImplementedError

    def stream(self, features: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Run on the next frames of utterances.

        Args:
            features: float32 [batch, frames, inputs], the next frames; zeros after the end of an utterance.
            state: as returned by the last call; None at the start.

        Returns:
            logits [batch, frames, units], of the frames `delay` before those of the input, and the new state.
        """
        raise NotImplementedError


def within(features: Tensor, lengths: Tensor) -> Tensor:
    """Bool [batch, frames]: which frames of features [batch, frames, inputs] are no padding."""
    return torch.arange(features.shape[1], device=features.device) < lengths.to(features.device)[:, None]
