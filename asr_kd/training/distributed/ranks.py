"""The processes of one job: joining them as `torchrun` says, small messages between them, and a clean end.

Nothing here does anything for a single process, so that a trainer need not ask how many there are.
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
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from asr_kd.errors import UserError

#: how long a rank waits for the others: as long as one of them may score a development set
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job."""

    rank: int = 0
    world: int = 1
    local: int = 0  # place among the processes of this machine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes what the job writes once."""
        return self.rank == 0


@contextmanager
def joined(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Be one of the processes that `torchrun` started: over NCCL where `device` is CUDA, else over gloo.

    Without WORLD_SIZE, or with 1, there is nothing to join. `cuda` becomes the GPU of this process's place on its machine.

    Raises:
        UserError: when the environment is not whole, the machine has fewer GPUs than processes, or the others do not answer.
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
        # when torchrun starts all anew, the addresses of those who are gone are still in its store
        store = dist.PrefixStore(f"start-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE,
            device_id=ranks.device if cuda else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        place = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        raise UserError(
            f"{place}: process {ranks.rank} of {ranks.world} could not join the others ({reason}); start all of them with torchrun"
        ) from None
    try:
        yield ranks
        dist.barrier()  # who leaves first takes its connections with it, and the first rank the store through which all meet
    finally:
        dist.destroy_process_group()


def _read(device: torch.device, environment: Mapping[str, str]) -> Ranks:
    if environment.get("WORLD_SIZE", "1") == "1":
        return Ranks(device=device)
    values = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(f"{name} is not set though WORLD_SIZE is; start the processes with torchrun")
        if name != "MASTER_ADDR":
            if not environment[name].isdigit():
                raise UserError(f"{name}: {environment[name]!r} is not a number; start the processes with torchrun")
            values[name] = int(environment[name])
    world, rank, local = values["WORLD_SIZE"], values["RANK"], values["LOCAL_RANK"]
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
    return Ranks(rank, world, local, device)


def broadcast(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the weights and buffers of the first."""
    if ranks.world > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)


def total(values: Tensor, ranks: Ranks) -> Tensor:
    """The sum of a small tensor over the ranks, on the device it came from; `values` stays as it is."""
    if ranks.world == 1:
        return values.clone()
    summed = values.to(ranks.device, copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


def gather(value: Any, ranks: Ranks) -> list[Any]:
    """What every rank says, in their order. `value` is what JSON can hold: nothing that a rank receives is ever run."""
    if ranks.world == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(ranks.device)
    parts = gather_uneven(mine, ranks)
    return [json.loads(bytes(part.cpu().numpy())) for part in parts]


def gather_uneven(values: Tensor, ranks: Ranks) -> list[Tensor]:
    """The one-dimensional tensors of all ranks, each with its own length, in their order.

    The lengths go first; then every rank broadcasts its tensor. (An all-gather would pad all to the longest.)
    """
    lengths = torch.zeros(ranks.world, dtype=torch.int32, device=values.device)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(values)], dtype=torch.int32, device=values.device))
    parts = [values.new_empty(length) for length in lengths.tolist()]
    parts[ranks.rank] = values
    for waiting in [dist.broadcast(part, rank, async_op=True) for rank, part in enumerate(parts) if len(part)]:
        waiting.wait()
    return parts
