"""The interface of a network: features and lengths in, logits and hidden states out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asr_kd.units import Units

#: name of a weight of a layer: what is before the layer's number, from 0, and what is behind it
OF_LAYER = re.compile(r"(\D+\.)(\d+)(\..+)")


class Outputs(NamedTuple):
    """A network's output for a batch.

    Attributes:
        logits: [batch, frames, units]; a row belongs to the input frame of the same index, whatever the network's delay.
        lengths: int64 [batch], frames of each: those of the input, but of a network that hears sound.
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
        # a row a frame, which torch does for a weight that is learned, and not for one that cannot be
        heard = self.project(logits.softmax(-1).flatten(0, -2)).unflatten(0, logits.shape[:-1])
        return hidden + heard, logits


class AcousticModel(nn.Module):
    """Base class of all networks: a new one is a file with such a class, and a line in `NETWORKS`.

    Padding never changes the rows within an utterance's length. The first number in the name of a weight is that of its layer, from 0; what has
    none is input or output.

    Attributes:
        taps: hidden states that can be asked for, with their widths: `layer.1` after the first layer, and so on.
        lookahead_frames: how far the output looks ahead, in frames; None for the whole utterance.
        streams: whether it can run while audio arrives: then it has `stream` and `delay`, and its state can be carried over in training.
        output: the last, linear layer.
        condition: tells layers what the output layer says below them; None where no layer is conditioned.
    """

    taps: dict[str, int]
    lookahead_frames: int | None
    streams: bool = False
    #: whether its input is the sound itself
    hears_sound: bool = False
    #: number of answers of `stream` before that of the first frame
    delay: int = 0
    output: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.condition: Condition | None = None

    def frames(self, rows: int) -> int:
        """Output frames of an utterance of so many rows of input."""
        return rows

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Run on whole utterances.

        Args:
            features: float32 [batch, frames, inputs].
            lengths: int64 [batch].
            taps: names of hidden states to return.
        """
        raise NotImplementedError

    def stream(self, features: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Run on the next frames of utterances, any number of them.

        All frames are answered once `lookahead_frames` zeros have followed the last one. `forward` says the same of the whole.

        Args:
            features: float32 [batch, frames, inputs], the next frames; zeros after the end of an utterance.
            state: as returned by the last call, which it does not change; None at the start.

        Returns:
            logits [batch, answers, units] of the next frames that can be answered for by now, after `delay` that belong to
            none; and the new state, tuples and lists of tensors and numbers.
        """
        raise NotImplementedError

    def begin_as(self, other: AcousticModel, layers: Sequence[int] | None = None) -> None:
        """Take the weights of another network, of all of it or of these of its layers; a RuntimeError if they are not this network's.

        Args:
            other: of the same kind.
            layers: number, from 1, of the layer that each of this network's begins as (DistilBERT, Sanh et al. 2019, arXiv 1910.01108); None:
                all layers.
        """
        self.load_state_dict(other.weights_of(layers))

    def weights_of(self, layers: Sequence[int] | None) -> dict[str, Tensor]:
        """The weights of this network with these of its layers in this order, as of `begin_as`; input and output are its own."""
        weights, found = self.state_dict(), {}
        if layers is None:
            return weights
        for name, weight in weights.items():
            if (parts := OF_LAYER.fullmatch(name)) is None:
                found[name] = weight
                continue
            before, number, behind = parts.groups()
            found |= {f"{before}{at}{behind}": weight for at, layer in enumerate(layers) if layer == int(number) + 1}
        return found


def detached(state: Any) -> Any:
    """A state of `stream` through which no gradient flows back."""
    if isinstance(state, Tensor):
        return state.detach()
    return type(state)(map(detached, state)) if isinstance(state, tuple | list) else state


def within(features: Tensor, lengths: Tensor) -> Tensor:
    """Bool [batch, frames]: which frames of features [batch, frames, inputs] are no padding."""
    return torch.arange(features.shape[1], device=features.device) < lengths.to(features.device)[:, None]
