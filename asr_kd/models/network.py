"""The contract of a network: features and lengths in, logits and what its layers hold out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from asr_kd.errors import UserError


class Outputs(NamedTuple):
    """What a network says of a batch.

    Attributes:
        logits: [batch, frames, units]: a row answers for the input frame of the same index, whatever the network's delay.
        lengths: int64 [batch], those of the input.
        hidden: of each tap that was asked for, [batch, frames, width], in the same time as the logits.
    """

    logits: Tensor
    lengths: Tensor
    hidden: dict[str, Tensor]


class AcousticModel(nn.Module):
    """Base of all networks: a new one is a file with such a class, and a line in `NETWORKS`.

    Padding never changes the rows within an utterance's length.

    Attributes:
        taps: hidden states that can be asked for, `layer.1` behind the first layer and so on, with their widths.
        lookahead_frames: how far the output looks ahead, in frames; None for the whole utterance.
        streams: whether it answers while it hears: then it has `stream` and `delay`.
        output: the linear layer that every network ends in.
    """

    taps: dict[str, int]
    lookahead_frames: int | None
    streams: bool = False
    #: outputs of `stream` that come before the first frame's
    delay: int = 0
    output: nn.Linear

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """The whole of a batch.

        Args:
            features: float32 [batch, frames, inputs]; lengths: int64 [batch]; taps: names of hidden states to return.
        """
        raise NotImplementedError

    def stream(self, features: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Go on with utterances of which earlier frames were heard.

        Args:
            features: float32 [batch, frames, inputs], the next frames, behind an utterance's end zeros; state: what the
                call before returned, None at the beginning.

        Returns:
            logits [batch, frames, units], of frames that lie `delay` behind the input, and the state behind it.
        """
        raise NotImplementedError


def check_taps(model: AcousticModel, taps: Sequence[str], where: str) -> None:
    """Refuse names that the network does not have.

    Raises:
        UserError: names `where` they were asked for.
    """
    for tap in taps:
        if tap not in model.taps:
            raise UserError(f"{where}: the network has no {tap}; it has {', '.join(model.taps)}")
