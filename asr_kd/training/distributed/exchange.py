"""What a trainer calls around each step, whatever the ranks exchange; and the count of the bytes that they send."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asr_kd.training.distributed.ranks import Ranks, total


@dataclass
class Traffic:
    """Bytes that one rank put into the collectives since the start of the run, by kind.

    Counted are gradients, models, moments and messages with their lengths, the bytes in which the ranks agree on a step
    and to go on, and the four a parameter in which DDP says what was used, where it looks for that; not counted are
    packet headers, what is sent once, at the start, and what the ranks say at a save.
    """

    world: int
    reduced: int = 0
    gathered: int = 0
    broadcast: int = 0

    def add(self, other: Traffic) -> None:
        """Count what was sent before too."""
        self.reduced += other.reduced
        self.gathered += other.gathered
        self.broadcast += other.broadcast

    @property
    def payload(self) -> int:
        """Bytes that went through the collectives: this rank's whole gradient for an all-reduce, its message for an all-gather, the
        messages of all ranks for broadcasts."""
        return self.reduced + self.gathered + self.broadcast

    @property
    def wire(self) -> int:
        """Bytes that leave this rank when the collectives run as rings, the fewest that they can do with.

        All-reduce: 2 (N - 1) / N of the payload; all-gather: N - 1 times; broadcast: (N - 1) / N, a mean over the ranks.
        """
        others = self.world - 1
        return (2 * others * self.reduced + others * self.broadcast) // self.world + others * self.gathered


@dataclass(frozen=True)
class Meeting:
    """What the ranks told each other before a step.

    Attributes:
        frames: that they will learn in it, together.
        seconds: of audio that they have heard since they last met, together.
        going: whether one of them still has batches.
        stop: whether one of them was asked to stop.
    """

    frames: float = 0.0
    seconds: float = 0.0
    going: bool = True
    stop: bool = False


class Exchange:
    """Several ranks that train one model; as it stands here, a single process, which exchanges nothing.

    One step of the trainer::

        met = exchange.meet(batch.frames, …)          # where exchange.meets
        share = exchange.begin_step(batch.frames, met.frames)
        outputs = exchange.network(features, lengths)
        (loss(outputs) * share).backward()  # the loss is a mean over the batch's frames
        exchange.average_gradients()       # before the gradients are clipped
        clip, optimizer.step()
        exchange.end_step()

    Every rank makes the same calls the same number of times. A rank without a batch goes through its last one with 0 frames.

    Attributes:
        network: the module that the forward pass goes through; the model itself is trained in place.
        traffic: what this rank has sent.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.network: nn.Module = model
        self.traffic = Traffic(ranks.world)

    def meet(self, frames: int, seconds: float, going: bool, stop: bool) -> Meeting:
        """Tell the others, in one message, what `Meeting` is the sum of."""
        said = torch.tensor([frames, seconds, going, stop], dtype=torch.float64)
        self.traffic.reduced += said.nbytes
        frames_of_all, seconds_of_all, goes_on, stops = total(said, self.ranks).tolist()
        return Meeting(frames_of_all, seconds_of_all, goes_on > 0, stops > 0)

    def begin_step(self, frames: int, everyone: float) -> float:
        """The factor on this rank's mean loss with which the averaged gradient is that of all ranks' frames together.

        Args:
            frames: that this rank learns; everyone: that all do, as they said when they last met.
        """
        return 1.0

    def average_gradients(self) -> None:
        """Average the gradients over the ranks where the backward pass has not done so."""

    def end_step(self) -> None:
        """Count a step that the optimiser has taken; the ranks may meet here."""

    @property
    def averages(self) -> bool:
        """Whether the coming step's gradient is of all ranks, so that one without a batch takes the step too."""
        return True

    @property
    def meets(self) -> bool:
        """Whether the ranks talk to each other in the coming step."""
        return True

    @property
    def settled(self) -> bool:
        """Whether no step was taken since the ranks last met: then all hold the same model."""
        return True

    def settle(self) -> None:
        """Meet now, however many steps that is after the last meeting: at the end of a phase, before its model is kept."""

    def restart(self) -> None:
        """Go on from the weights that the model has now, as loaded on all ranks: forget what belongs to others."""

    def global_weights(self) -> AbstractContextManager[None]:
        """While open, the model has the weights to score and to save."""
        return nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """All that this rank must keep, beside model and optimiser, to go on as if never stopped."""
        traffic = self.traffic
        return {"traffic": torch.tensor([traffic.reduced, traffic.gathered, traffic.broadcast])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            KeyError, RuntimeError: when it belongs to another method or another network.
        """
        self.traffic.reduced, self.traffic.gathered, self.traffic.broadcast = state["traffic"].tolist()

    def _share(self, frames: int, everyone: float) -> float:
        """`frames`, in units of the mean over the ranks; nothing at all where no rank has any."""
        return frames * self.ranks.world / everyone if everyone else 0.0
