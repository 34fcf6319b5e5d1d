"""Gradients in fewer bytes, as communication hooks of DistributedDataParallel: threshold compression and PowerSGD.

Threshold compression is N. Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015;
README.md says how it works, and what of it is exact. A threshold has few binary digits, so that taking it from a residual
needs no rounding; the sums over the ranks are whole numbers, exact in any order.

The residual is in the order of the model's parameters and does not depend on the buckets into which DDP sorts them (and sorts
them again after the first step): the buckets are only collected, and with the last one of a step a single message is sent.

(No `from __future__ import annotations` here: see ddp.py.)
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from asr_kd.training.distributed.ddp import DataParallel
from asr_kd.training.distributed.ranks import Ranks, gather_uneven, total
from asr_kd.training.settings import PowerSgdSettings, ThresholdSettings

#: significant binary digits of a threshold
DIGITS = 8
#: relative change of an adaptive threshold in a step whose density is off by 100 % of the target
GAIN = 1 / 16
#: smallest adaptive threshold, for gradients that are zero throughout
SMALLEST = 2.0**-64


def round_threshold(threshold: float) -> float:
    """The nearest number of `DIGITS` significant binary digits."""
    mantissa, exponent = math.frexp(threshold)
    return math.ldexp(round(mantissa * 2**DIGITS), exponent - DIGITS)


def take(residual: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Take ±`threshold` from every element of `residual` [elements] that has reached it, in place.

    Returns:
        their indices, int64, rising, and whether they are negative, bool.
    """
    indices = (residual.abs() >= threshold).nonzero().flatten()
    negative = residual[indices] < 0
    residual[indices] -= threshold * (1 - 2 * negative.to(residual.dtype))
    return indices, negative


def pack(indices: Tensor, negative: Tensor, elements: int) -> Tensor:
    """What `take` took of `elements` elements, as bytes.

    Their number in 4 bytes; a bit array with a one at (upper bits + rank) of each; the lower bits and the sign of each.
    """
    number = len(indices)
    low = _low_bits(number, elements)
    upper = indices.new_zeros(number + (elements >> low) + 1)
    upper[(indices >> low) + torch.arange(number, device=indices.device)] = 1
    rest = (indices & ((1 << low) - 1)) << 1 | negative
    bits = torch.cat([upper, (rest[:, None] >> torch.arange(low + 1, device=indices.device) & 1).flatten()])
    bits = nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    header = torch.tensor([number], dtype=torch.int32, device=indices.device).view(torch.uint8)
    return torch.cat([header, (bits << torch.arange(8, device=indices.device)).sum(1).to(torch.uint8)])


def unpack(message: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """The reverse of `pack`."""
    number = int(message[:4].view(torch.int32))
    low = _low_bits(number, elements)
    bits = (message[4:, None] >> torch.arange(8, device=message.device, dtype=torch.uint8) & 1).flatten()
    length = number + (elements >> low) + 1
    upper = bits[:length].nonzero().flatten() - torch.arange(number, device=message.device)
    rest = bits[length : length + number * (low + 1)].view(number, low + 1).long()
    rest = (rest << torch.arange(low + 1, device=message.device)).sum(1)
    return upper << low | rest >> 1, (rest & 1).bool()


def _low_bits(number: int, elements: int) -> int:
    """Number of lower bits sent as they are: log2 of the mean distance between two indices, rounded down."""
    return (elements // max(number, 1)).bit_length() - 1


class ThresholdCompression(DataParallel):
    """The exchange of `compression: threshold`.

    A gradient that is not finite on one rank becomes NaN on all, as without compression; it must not stay in a residual.

    Attributes:
        residual: float32 [elements], what was not sent yet, in the order of the parameters.
        threshold: present threshold before rounding; None until the first compressed step has found one.
        sent: elements that all ranks sent in the last step.
    """

    def __init__(self, model: nn.Module, settings: ThresholdSettings, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        self.settings, self.threshold = settings, settings.threshold
        self.sent = elements = 0
        self._slices: dict[Tensor, slice] = {}
        for one in model.parameters():
            if one.requires_grad:
                self._slices[one] = slice(elements, elements + one.numel())
                elements += one.numel()
        self.residual = torch.zeros(elements, device=ranks.device)
        self._step = 0
        self._waiting: list[tuple[dist.GradBucket, torch.futures.Future[Tensor]]] = []

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Add the bucket to the residual; with the last bucket of the step, exchange what has reached the threshold."""
        if self._step < self.settings.warmup_steps:
            self._step += bucket.is_last()
            return super().hook(bucket)
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.residual[self._slices[parameter]] += gradient.flatten()
        cuda = self.residual.is_cuda
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[self.residual.device] if cuda else None)
        self._waiting.append((bucket, future))
        if bucket.is_last():
            self._step += 1
            mean = self._exchange()
            for earlier, promised in self._waiting:
                for parameter, gradient in zip(earlier.parameters(), earlier.gradients(), strict=True):
                    gradient.copy_(mean[self._slices[parameter]].view_as(gradient))
                promised.set_result(earlier.buffer())
            self._waiting.clear()
        return future

    def _exchange(self) -> Tensor:
        """The mean over the ranks of what they send this step, [elements]."""
        elements = len(self.residual)
        if self.threshold is None:
            self.threshold = self._first_threshold()
        threshold = round_threshold(self.threshold)
        message = pack(*take(self.residual, threshold), elements)
        if not self.residual.isfinite().all():
            message = message[:0]
        if self.settings.residual_clip:
            limit = self.settings.residual_clip * threshold
            self.residual.clamp_(-limit, limit)
        messages = gather_uneven(message, self.ranks)
        self.traffic.gathered += 4
        self.traffic.broadcast += sum(map(len, messages))
        if not all(map(len, messages)):
            return torch.full_like(self.residual, math.nan)
        counts = torch.zeros_like(self.residual)
        self.sent = 0
        for one in messages:
            indices, negative = unpack(one, elements)
            counts[indices] += 1 - 2 * negative.to(counts.dtype)  # the indices of one message are all different
            self.sent += len(indices)
        if self.settings.density:
            # only sums, products and quotients: the same bits on every machine
            wanted = self.settings.density * elements * self.ranks.world
            self.threshold = max(self.threshold * (1 + GAIN * min(self.sent / wanted - 1, 4.0)), SMALLEST)
        return counts * (threshold / self.ranks.world)

    def _first_threshold(self) -> float:
        """The threshold that `density` of this step's elements reach, a mean over the ranks."""
        assert self.settings.density is not None
        elements = len(self.residual)
        reaching = max(1, round(self.settings.density * elements))
        own = self.residual.abs().kthvalue(elements + 1 - reaching).values
        self.traffic.reduced += 8
        return max(total(own.double(), self.ranks).item() / self.ranks.world, SMALLEST)

    def restart(self) -> None:
        """Clear the residual: it belongs to earlier weights."""
        self.residual.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        threshold = torch.tensor(math.nan if self.threshold is None else self.threshold, dtype=torch.float64)
        own = {"residual": self.residual, "threshold": threshold, "step": torch.tensor(self._step)}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.residual.copy_(state["residual"])
        threshold = state["threshold"].item()
        self.threshold = None if math.isnan(threshold) else threshold
        self._step = int(state["step"])


class PowerSgd(DataParallel):
    """The exchange of `compression: powersgd`: PyTorch's hook (Vogels et al. 2019, arXiv 1905.13727), counted and saved."""

    fixed_buckets = True  # its errors are kept by bucket

    def __init__(self, model: nn.Module, settings: PowerSgdSettings, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        state = PowerSGDState(None, matrix_approximation_rank=settings.rank, start_powerSGD_iter=settings.warmup_steps)
        self._kept = {"error": state.error_dict, "p": state.p_memory_dict, "q": state.q_memory_dict}
        self._state = state

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Run PyTorch's hook, and count what it sends: thin matrices, or the whole tensor if they would not be smaller."""
        state = self._state
        before = state.total_numel_after_compression
        whole = state.iter < state.start_powerSGD_iter
        future = powerSGD_hook(state, bucket)
        future.wait()  # gloo runs its later collectives in other threads: those of two buckets could come in any order
        elements = bucket.buffer().numel() if whole else state.total_numel_after_compression - before
        self.traffic.reduced += elements * bucket.buffer().element_size()
        return future

    def restart(self) -> None:
        """Clear the errors: they belong to earlier weights."""
        self._state.error_dict.clear()

    def state_dict(self) -> dict[str, Tensor]:
        kept = {f"{name}.{bucket}": value for name, parts in self._kept.items() for bucket, value in parts.items()}
        return super().state_dict() | kept | {"step": torch.tensor(self._state.iter)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._state.iter = int(state["step"])
        for name, parts in self._kept.items():
            parts.clear()
            parts |= {
                int(key.removeprefix(f"{name}.")): value for key, value in state.items() if key.startswith(f"{name}.")
            }
