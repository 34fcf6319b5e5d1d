"""Block-wise model-update filtering (BMUF): ranks train alone for a block of steps, then average and filter the change.

The algebra, with W the global model, S the start of a block, W_i the model of rank i at its end, f_i the frames it saw::

    G     = sum_i f_i (W_i - S) / sum_i f_i       the mean change of the block, from its start
    D    <- momentum * D + rate * G
    W    <- W + D
    S    <- W                                     classical
            W + momentum * D                      Nesterov: the look-ahead, where momentum alone would lead

W and the look-ahead S are separate. The change is taken from S, not from W: the ranks' steps are a gradient *at the
look-ahead point*, to be applied to W, as in Nesterov's method; W_i - W would count the look-ahead, momentum * D, twice.
This is Chen & Huo, "Scalable training of deep learning machines by incremental block training with intra-block parallel
optimization and blockwise model-update filtering", ICASSP 2016, as we understand it. README.md: what the settings do, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import BmufSettings


class Bmuf(Exchange):
    """The exchange of `method: bmuf`, for two ranks or more. It starts from the first rank's weights.

    After a meeting the model holds the look-ahead S; `global_weights` gives W.

    Args:
        model: what is trained.
        optimizer: its moments are averaged or reset at each meeting.
        settings: the block's.
        ranks: who takes part.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: BmufSettings, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        self.optimizer, self.settings = optimizer, settings
        self.momentum = 1 - 1 / ranks.world if settings.block_momentum is None else settings.block_momentum
        self._parameters = [one for one in model.parameters() if one.requires_grad]
        self._step = self._block_step = self._frames = 0
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        self.restart()

    @property
    def _warming_up(self) -> bool:
        return self._step < self.settings.warmup_steps

    def begin_step(self, frames: int, everyone: float) -> float:
        """Within a block a rank uses its own mean loss, and a factor of 0 without frames."""
        if self._warming_up:
            return self._share(frames, everyone)
        self._frames += frames
        return float(frames > 0)

    def average_gradients(self) -> None:
        """Give every weight a gradient; in the warm-up the mean over the ranks, as in plain synchronous training."""
        for one in self._parameters:
            # another rank's batch may have used it: all ranks must reduce the same lengths, and take the same step
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        if not self._warming_up:
            return
        gradients = [one.grad for one in self._parameters if one.grad is not None]
        flat = _flat(gradients)
        self._all_reduce(flat)
        _write(gradients, flat / self.ranks.world)

    def end_step(self) -> None:
        """Count a step, and meet after the last one of a block or of the warm-up."""
        if self._warming_up:
            self._step += 1
            if not self._warming_up:
                self.restart()
            return
        self._step += 1
        self._block_step += 1
        if self._block_step == self.settings.block_steps:
            self.settle()

    @property
    def averages(self) -> bool:
        return self._warming_up

    @property
    def meets(self) -> bool:
        return self._warming_up or self._block_step + 1 == self.settings.block_steps

    @property
    def settled(self) -> bool:
        return self._block_step == 0

    @torch.no_grad()
    def settle(self) -> None:
        """Meet: filter the mean change of the models, and start a block."""
        if self.settled:
            return
        start = self._start()
        change, frames = self._mean(_flat(self._parameters) - start)
        self._change.mul_(self.momentum).add_(change, alpha=self.settings.block_rate)
        self._weights.add_(self._change)
        _write(self._parameters, self._start())
        self._meet_buffers()
        if self.settings.optimizer_state == "reset":
            self.optimizer.state.clear()
        elif self.settings.optimizer_state == "average" and frames:
            self._meet_moments()
        self._block_step = self._frames = 0

    def restart(self) -> None:
        """The model's weights become the global model, and its momentum 0."""
        self._weights = _flat(self._parameters)
        self._change = torch.zeros_like(self._weights)
        self._block_step = self._frames = 0

    @contextmanager
    def global_weights(self) -> Iterator[None]:
        """W of the last meeting, in place of this rank's weights; in the warm-up they are the same."""
        if self._warming_up:
            yield
            return
        own = _flat(self._parameters)
        _write(self._parameters, self._weights)
        try:
            yield
        finally:
            _write(self._parameters, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's weights, saved beside it, are this rank's own, possibly in the middle of a block."""
        counts = torch.tensor([self._step, self._block_step, self._frames])
        return {**super().state_dict(), "counts": counts, "weights": self._weights, "change": self._change}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._step, self._block_step, self._frames = state["counts"].tolist()
        self._weights.copy_(state["weights"])
        self._change.copy_(state["change"])

    def _start(self) -> Tensor:
        """S of the present block, recomputed bit for bit."""
        return self._weights + self.momentum * self._change if self.settings.nesterov else self._weights

    def _mean(self, values: Tensor) -> tuple[Tensor, float]:
        """The mean over the ranks, weighted by the frames of the block, and the number of frames; zeros if there are none."""
        message = torch.cat([values * self._frames, values.new_tensor([self._frames])])
        self._all_reduce(message)
        frames = message[-1].item()
        return message[:-1] / max(frames, 1.0), frames

    def _meet_buffers(self) -> None:
        """Average running statistics; take counters from the first rank."""
        statistics = [one for one in self.model.buffers() if one.is_floating_point()]
        if statistics:
            values, frames = self._mean(_flat(statistics))
            if frames:
                _write(statistics, values)
        for counter in self.model.buffers():
            if not counter.is_floating_point():
                dist.broadcast(counter, 0)
                self.traffic.broadcast += counter.nbytes

    def _meet_moments(self) -> None:
        """Average the moments (0 on a rank without a gradient so far); of a step count take the largest."""
        if isinstance(self.optimizer, torch.optim.Adam):  # AdamW is one; it makes a weight's moments in its first step
            for one in self._parameters:
                if not self.optimizer.state[one]:
                    moments = {name: torch.zeros_like(one) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[one] = {"step": torch.zeros(()), **moments}
        states = [self.optimizer.state[one] for one in self._parameters]
        names = sorted({name for state in states for name, value in state.items() if isinstance(value, Tensor)})
        tensors = [state[name] for state in states for name in names]
        rows = [one for one in tensors if one.dim()]
        counts = [one for one in tensors if not one.dim()]
        if rows:
            _write(rows, self._mean(_flat(rows))[0])
        if counts:
            largest = torch.stack(counts).to(self.ranks.device)
            self._all_reduce(largest, dist.ReduceOp.MAX)
            _write(counts, largest)

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        dist.all_reduce(tensor, operation)
        self.traffic.reduced += tensor.nbytes


def _flat(tensors: list[Tensor] | list[nn.Parameter]) -> Tensor:
    """A copy of all tensors, flattened into one."""
    return torch.cat([one.detach().flatten() for one in tensors])


@torch.no_grad()
def _write(tensors: list[Tensor] | list[nn.Parameter], flat: Tensor) -> None:
    """The reverse of `_flat`, in place."""
    for one, part in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        one.copy_(part.view_as(one))
