"""Synchronous training: PyTorch's DistributedDataParallel, every gradient averaged over the ranks, compressed where asked."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from asr_kd.training.distributed.compression import PlainGradients, PowerSgd, ThresholdCompression
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import DistributedSettings


class DataParallel(Exchange):
    """The exchange of `method: ddp`, for two ranks or more. It starts from the first rank's weights.

    A step equals, up to rounding, that of one process with the batches of all ranks in one: the backward pass averages the
    gradients, and `begin_step` weights each rank's mean loss by its frames.

    Attributes:
        compression: the communication hook.
    """

    def __init__(self, model: nn.Module, settings: DistributedSettings, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        self.compression = _compression(model, settings, ranks, self)
        # DDP sorts its buckets again after the first step of a process, also of a resumed one, unless it looks for unused
        # parameters. The order in which a ring of three or more ranks sums depends on the buckets, so on a CPU, where a resumed
        # run must give the same bits, they are fixed.
        cuda = ranks.device.type == "cuda"
        fixed = self.compression.fixed_buckets or not cuda
        network = DistributedDataParallel(
            model, device_ids=[ranks.device.index] if cuda else None, find_unused_parameters=fixed
        )
        network.register_comm_hook(None, self.compression.hook)
        self.network = network
        self._buffer_bytes = sum(one.nbytes for one in model.buffers())
        self._found_bytes = 4 * sum(one.requires_grad for one in model.parameters()) if fixed else 0

    def begin_step(self, frames: int, everyone: float) -> float:
        """See `Exchange`."""
        self.traffic.broadcast += self._buffer_bytes  # DDP broadcasts the first rank's buffers before a forward pass
        self.traffic.reduced += self._found_bytes  # and reduces which parameters were used after the backward pass
        return self._share(frames, everyone)

    def restart(self) -> None:
        """See `Exchange`."""
        self.compression.restart()

    def state_dict(self) -> dict[str, Tensor]:
        """See `Exchange`."""
        return {**super().state_dict(), **self.compression.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Exchange`."""
        super().load_state_dict(state)
        self.compression.load_state_dict(state)


def _compression(model: nn.Module, settings: DistributedSettings, ranks: Ranks, owner: Exchange) -> PlainGradients:
    if settings.compression == "threshold":
        parameters = (one for one in model.parameters() if one.requires_grad)
        return ThresholdCompression(parameters, settings.threshold, ranks, owner.traffic)
    if settings.compression == "powersgd":
        return PowerSgd(settings.powersgd, owner.traffic)
    return PlainGradients(owner.traffic)
