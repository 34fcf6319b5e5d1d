"""The calls a trainer makes around each step, for any method of exchange; and a count of the bytes sent."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asr_kd.training.distributed.ranks import Ranks, total


@dataclass
class Traffic:
    """Bytes that went through collectives since the start of the run, by kind: this rank's whole gradient for an all-reduce, its
    message for an all-gather, the messages of all ranks for broadcasts.

    Counted: gradients, models, moments, messages with their lengths, the ranks' agreement on each step, and the four bytes a
    parameter in which DDP reduces which parameters were used, if it does. Not counted: packet headers, what is sent once at
    the start, and what the ranks exchange at a save.
    """

    world: int
    reduced: int = 0
    gathered: int = 0
    broadcast: int = 0

    @property
    def wire(self) -> int:
        """Bytes that leave this rank if the collectives run as rings, the least possible.

        All-reduce: 2 (N - 1) / N of what is counted; all-gather: N - 1 times that; broadcast: (N - 1) / N of it, a mean over the
        ranks.
        """
        others = self.world - 1
        return (2 * others * self.reduced + others * self.broadcast) // self.world + others * self.gathered


class Meeting(NamedTuple):
    """What the ranks told each other before a step: sums over all, and whether any rank says yes.

    Attributes:
        frames: learned in the step.
        seconds: audio heard since the last meeting.
        going: whether any rank has a batch.
        stop: whether any rank was asked to stop.
    """

    frames: float = 0.0
    seconds: float = 0.0
    going: bool = True
    stop: bool = False


class Exchange:
    """How ranks that train one model synchronise; this base class is for a single process, which exchanges nothing.

    One step of the trainer::

        met = exchange.meet(batch.frames, …)          # where exchange.meets
        share = exchange.begin_step(batch.frames, met.frames)
        outputs = exchange.network(features, lengths)
        (loss(outputs) * share).backward()  # the loss is a mean over the batch's frames
        exchange.average_gradients()       # before the gradients are clipped
        clip, optimizer.step()
        exchange.end_step()

    Every rank makes the same calls the same number of times; a rank without a batch reports 0 frames.

    Attributes:
        network: the module to call for the forward pass; the model itself is trained in place.
        traffic: bytes that this rank has sent.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.network: nn.Module = model
        self.traffic = Traffic(ranks.world)

    def meet(self, frames: int, seconds: float, going: bool, stop: bool) -> Meeting:
        """Sum this rank's values over all ranks, in one collective.

        Args:
            frames: frames that this rank learns in the step.
            seconds: audio that this rank has heard since the last meeting.
            going: whether this rank still has batches.
            stop: whether this rank was asked to stop.
        """
        said = torch.tensor([frames, seconds, going, stop], dtype=torch.float64)
        self.traffic.reduced += said.nbytes
        frames_of_all, seconds_of_all, goes_on, stops = total(said, self.ranks).tolist()
        return Meeting(frames_of_all, seconds_of_all, goes_on > 0, stops > 0)

    def begin_step(self, frames: int, everyone: float) -> float:
        """The factor on the mean loss of this rank's `frames` that makes the averaged gradient the mean over the frames of all
        ranks, `everyone`, as the last `meet` gave them."""
        return 1.0

    def average_gradients(self) -> None:
        """Average the gradients over the ranks, if the backward pass has not done so."""

    def end_step(self) -> None:
        """Count a step that the optimiser has taken; the ranks may meet here."""

    @property
    def averages(self) -> bool:
        """Whether the next step's gradient is averaged over all ranks, so that a rank without a batch must take part."""
        return True

    @property
    def meets(self) -> bool:
        """Whether the ranks communicate in the next step."""
        return True

    @property
    def settled(self) -> bool:
        """Whether all ranks hold the same model: no step was taken since the last meeting."""
        return True

    def settle(self) -> None:
        """Synchronise now, even in the middle of a block; called at the end of a phase, before its model is kept."""

    def restart(self) -> None:
        """Continue from the weights just loaded into the model on all ranks; drop state that belongs to earlier weights."""

    def global_weights(self) -> AbstractContextManager[None]:
        """Within this context the model holds the weights to score and to save."""
        return nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank must save, besides model and optimiser, to resume exactly."""
        traffic = self.traffic
        return {"traffic": torch.tensor([traffic.reduced, traffic.gathered, traffic.broadcast])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            KeyError, RuntimeError: when it belongs to another method or another network.
        """
        self.traffic.reduced, self.traffic.gathered, self.traffic.broadcast = state["traffic"].tolist()

    def _share(self, frames: int, everyone: float) -> float:
        """`frames` as a multiple of the mean over the ranks; 0 if no rank has any."""
        return frames * self.ranks.world / everyone if everyone else 0.0
