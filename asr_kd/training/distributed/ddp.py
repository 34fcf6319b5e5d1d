"""Synchronous training: PyTorch's DistributedDataParallel, every gradient averaged over the ranks.

(No `from __future__ import annotations` here: DDP checks the annotations of a hook, and wants types, not text.)
"""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks


class DataParallel(Exchange):
    """The exchange of `method: ddp`, for two ranks or more. It starts from the first rank's weights.

    A step equals, up to rounding, that of one process with the batches of all ranks in one: the backward pass averages the
    gradients, and `begin_step` weights each rank's mean loss by its frames. What compresses gradients overrides `hook`.
    """

    #: whether DDP must not sort its buckets again after the first step
    fixed_buckets = False

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        # DDP sorts its buckets again after the first step of a process, also of a resumed one, unless it looks for unused
        # parameters. The order in which a ring of three or more ranks sums depends on the buckets, so on a CPU, where a resumed
        # run must give the same bits, they are fixed.
        cuda = ranks.device.type == "cuda"
        fixed = self.fixed_buckets or not cuda
        network = DistributedDataParallel(
            model, device_ids=[ranks.device.index] if cuda else None, find_unused_parameters=fixed
        )
        # a bound method would be a cycle through C++, which is never collected: every phase would leave its buffers behind
        network.register_comm_hook(weakref.proxy(self), type(self).hook)
        self.network = network
        self._buffer_bytes = sum(one.nbytes for one in model.buffers())
        self._found_bytes = 4 * sum(one.requires_grad for one in model.parameters()) if fixed else 0

    def begin_step(self, frames: int, everyone: float) -> float:
        self.traffic.broadcast += self._buffer_bytes  # DDP broadcasts the first rank's buffers before a forward pass
        self.traffic.reduced += self._found_bytes  # and reduces which parameters were used after the backward pass
        return self._share(frames, everyone)

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Average the bucket over the ranks."""
        self.traffic.reduced += bucket.buffer().nbytes
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)
