"""The processes of one job: joining what `torchrun` started, small messages between them, and a clean end.

For a single process all of this does nothing, so that a trainer need not ask how many there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# before a group is there: the defaults of its functions would keep the group of the moment, whose threads then live on, until the
# interpreter ends, and sometimes kill it there ("terminate called without an active exception"); the first AdamW step imports it
import torch.distributed.nn
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from asr_kd.errors import UserError

#: how long a rank waits for the others, which may be scoring the development set
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes what the job writes once."""
        return self.rank == 0


@contextmanager
def joined(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started: by NCCL if `device` is CUDA, else by gloo.

    Without WORLD_SIZE, or with 1, there is nothing to join. `cuda` becomes the GPU with this process's local rank.

    Raises:
        UserError: when the environment is incomplete, the machine has fewer GPUs than processes, or the others do not answer.
    """
    ranks = _read(device, environment)
    if ranks.world == 1:
        yield ranks
        return
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.device)
    try:
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=PATIENCE))
        # after a restart by torchrun its store still holds the addresses of the old processes
        store = dist.PrefixStore(f"start-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE,
            device_id=ranks.device if cuda else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        raise UserError(
            f"{address}: process {ranks.rank} of {ranks.world} could not join the others ({reason}); start all of them with torchrun"
        ) from None
    try:
        yield ranks
        dist.barrier()  # a rank that leaves early closes its connections, and the first rank the store that all use
    finally:
        dist.destroy_process_group()


def _read(device: torch.device, environment: Mapping[str, str]) -> Ranks:
    if environment.get("WORLD_SIZE", "1") == "1":
        return Ranks(device=device)
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    for name in (*names, "MASTER_ADDR"):
        if not environment.get(name):
            raise UserError(f"{name} is not set though WORLD_SIZE is; start the processes with torchrun")
        if name in names and not environment[name].isdigit():
            raise UserError(f"{name}: {environment[name]!r} is not a number; start the processes with torchrun")
    world, rank, local = (int(environment[name]) for name in names[:3])
    if not rank < world:
        raise UserError(f"RANK {rank} is not below WORLD_SIZE {world}; start the processes with torchrun")
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"device: {device} is one GPU for {world} processes; set device=cuda, each takes its own")
        if local >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs and more processes; start one for each with --nproc-per-node"
            )
        device = torch.device("cuda", local)
    return Ranks(rank, world, device)


def total(values: Tensor, ranks: Ranks) -> Tensor:
    """The sum of a small tensor over the ranks, on the device it came from; `values` is not changed."""
    if ranks.world == 1:
        return values.clone()
    summed = values.to(ranks.device, copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


def gather(value: Any, ranks: Ranks) -> list[Any]:
    """The values of all ranks, in order. `value` must be valid JSON: nothing received is ever executed."""
    if ranks.world == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(ranks.device)
    return [json.loads(bytes(part.cpu().numpy())) for part in gather_uneven(mine, ranks)]


def gather_uneven(values: Tensor, ranks: Ranks) -> list[Tensor]:
    """The one-dimensional tensors of all ranks, of any lengths, in order.

    The lengths are gathered first; then every rank broadcasts its tensor. (An all-gather would pad all to the longest.)
    """
    lengths = torch.zeros(ranks.world, dtype=torch.int32, device=values.device)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(values)], dtype=torch.int32, device=values.device))
    parts = [values.new_empty(length) for length in lengths.tolist()]
    parts[ranks.rank] = values
    for waiting in [dist.broadcast(part, rank, async_op=True) for rank, part in enumerate(parts) if len(part)]:
        waiting.wait()
    return parts
